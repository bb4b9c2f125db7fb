"""The study file: what it accepts, and that each mistake is named with its line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.study import cli
from megatron_opt.study.grids import default_space
from megatron_opt.study.hyperparameters import PAPER_GRIDS, PAPER_STARTS, flag_of, schedule_flags
from megatron_opt.study.runs import argument_list, make_run
from megatron_opt.study.spec import Regime
from megatron_opt.study.study_file import read_study
from tests.study.conftest import STUDY

MISTAKES = [
    ("adamw:\n    grid: {lr: [0.004, 0.008, 0.064]}", "adamw:\n    grid: {lr: []}", 12, "empty list"),
    ("adamw:\n    grid: {lr: [0.004, 0.008, 0.064]}", "adamw:\n    grid: {}", 12, "grid of `adamw` is empty"),
    (
        "adamw:\n    grid: {lr: [0.004, 0.008, 0.064]}",
        "adamw:\n    gird: {lr: [1]}",
        12,
        "unknown key `gird` in optimizer `adamw`; did you mean `grid`?",
    ),
    (
        "adamw:\n    grid: {lr: [0.004, 0.008, 0.064]}",
        "adamw:\n    grid: {lr: [0.1, 0.1, 0.2]}",
        12,
        "repeats a value",
    ),
    (
        "adamw:\n    grid: {lr: [0.004, 0.008, 0.064]}",
        "adamw:\n    grid: {lr: [fast]}",
        12,
        "must be a number",
    ),
    (
        "adamw:\n    grid: {lr: [0.004, 0.008, 0.064]}",
        "nadam:\n    grid: {lr: [1, 2, 3]}",
        1,
        "baseline 'adamw'",
    ),
    (
        "[0.008, 0.016, 0.032]",
        "[0.008, 0.016]",
        10,
        "unequal tuning effort: runs in each regime are adamw 3, muon 2",
    ),
    ("jobs: 2", "jbos: 2", 16, "unknown key `jbos` in `executor:`; did you mean `jobs`?"),
    ("jobs: 2", "jobs: two", 16, "must be a whole number"),
    ("jobs: 2", "slurm: 3", 16, "`slurm:` must be a mapping of keys to values, not 3"),
    ("jobs: 2", "environment: [a]", 16, "`environment:` must be a mapping"),
    ("name: small", "name: small\nflags: 3", 2, "`flags:` must be a mapping"),
    ("num_layers: 2,", "flags: [a], num_layers: 2,", 4, "`flags:` must be a mapping"),
    ("grid: {lr: [0.004, 0.008, 0.064]}", "start: 3", 12, "`start:` must be a mapping"),
    ("jobs: 2", "kind: kubernetes", 16, "not one of local, slurm"),
    ("sequence_length: 64", "sequence_length: -64", 2, "greater than 0"),
    ("sequence_length: 64\n", "", 1, "lacks `sequence_length:`"),
    ("num_layers: 2, ", "", 4, "lacks num_layers"),
    ("num_attention_heads: 2", "num_attention_heads: 3", 4, "not a multiple"),
    ("hidden_size: 32", "hidden_siz: 32", 4, "lacks hidden_size"),
    (
        "{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}",
        "{preset: nowhere}",
        4,
        "no preset 'nowhere'",
    ),
    ("  valid: [valid]\n", "", 5, "no `valid:`"),
    ("  train: [train]\n", "  train: [train]\n  path: [x]\n", 5, "needs either"),
    ("[train]", '["${NO_SUCH_VARIABLE}/train"]', 7, "not set"),
    ("defaults: {batch_size: 4, weight_decay: 0.1}", "defaults: {weight_decay: 0.1}", 11, "no batch_size"),
    ("grid: {lr: [0.004, 0.008, 0.064]}", "start: {beta1: 0.9}", 11, "no learning rate"),
    ("name: small", "name: small\nname: again", 2, "given twice"),
    ("name: small", "name: [small", 1, "not valid YAML"),
    ("name: small", "name: small\nphases: [gird]", 2, "no phase 'gird'"),
    ("name: small", "name: small\nphases: [predict]", 2, "needs `regimes:`"),
    ("name: small", "name: small\nphases: [{kind: restricted, regimes: [tiny@2x]}]", 2, "needs a 'descent'"),
    ("name: small", "name: small\nphases: [{kind: grid, regimes: [huge@2x]}]", 2, "names no model"),
    ("name: small", "name: small\nphases: [{kind: grid, regimes: [tiny]}]", 2, "is not a regime"),
    ("name: small", "name: small\nseeds: [1, 1]", 2, "different whole numbers"),
    ("name: small", "name: small\nratios: [0]", 2, "greater than 0"),
    ("name: small", "name: small\nthresholds: {adopted: 1}", 2, "did you mean `adopt`?"),
]


@pytest.mark.parametrize("old,new,line,words", MISTAKES, ids=[words for *_, words in MISTAKES])
def test_each_mistake_is_named_with_its_line(make_study, old, new, line, words):
    assert old in STUDY
    path = make_study(STUDY.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_study(path)
    message = str(caught.value)
    assert words in message
    assert message.startswith(f"{path}:"), message
    if "not valid YAML" not in words:
        assert int(message.removeprefix(f"{path}:").split(":")[0]) == line, message


def test_a_missing_or_empty_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot read the study file"):
        read_study(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match="must be a mapping"):
        read_study(tmp_path / "empty.yaml")


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abc:{}[]-\n 01.e'\"#&*!|>%@", max_size=60))
def test_no_text_makes_the_reader_fail_in_another_way(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("s") / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        read_study(path)


def test_mappings_may_be_merged_and_keep_their_lines(make_study):
    """YAML's `<<`, of which the reader knew nothing: its own keys win, and a mistake in what is merged has its line."""
    text = STUDY.replace("jobs: 2", "<<: {jobs: 3, ranks: 1}\n  jobs: 2")
    assert read_study(make_study(text)).executor.jobs == 2
    with pytest.raises(UserError, match=r":16: unknown key `jbos`"):
        read_study(make_study(STUDY.replace("jobs: 2", "<<: {jbos: 3}")))


def test_numbers_may_be_written_as_people_write_them(make_study):
    study = read_study(make_study(STUDY.replace("[0.004, 0.008, 0.064]", "[4e-3, 8.0e-3, 1E-2]")))
    assert study.optimizers["adamw"].grid["lr"] == (0.004, 0.008, 0.01)


def test_every_paper_grid_makes_a_study(make_study):
    entries = "".join(f"  {name}: {{grid: paper}}\n" for name in PAPER_GRIDS)
    text = STUDY[: STUDY.index("optimizers:")] + "optimizers:\n" + entries + "phases: [descent]\n"
    study = read_study(make_study(text))
    assert set(PAPER_GRIDS) == set(PAPER_STARTS) == set(study.optimizers)
    for name, space in study.optimizers.items():
        assert set(space.grid) <= set(space.start), name
        run = make_run(study, name, Regime("tiny", 1.0), space.start, 1)
        assert "--lr" in run.arguments and "--optimizer" in run.arguments


def test_parameters_follow_the_papers_formula(make_study):
    shapes = {"130m": (512, 2048, 134_217_728), "520m": (1024, 4096, 536_870_912)}
    for name, (hidden, ffn, expected) in shapes.items():
        shape = f"{{num_layers: 32, hidden_size: {hidden}, ffn_hidden_size: {ffn}, num_attention_heads: 8}}"
        study = read_study(
            make_study(
                STUDY.replace(
                    "tiny: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}",
                    f"{name}: {shape}",
                )
            )
        )
        assert study.models[name].non_embedding_parameters == expected
        assert study.tokens(Regime(name, 1.0)) == 20 * expected


def test_a_runs_identity_is_what_it_trains_not_where_its_files_lie(make_study, tmp_path):
    def identity(text=STUDY, **hyper):
        study = read_study(make_study(text))
        return make_run(study, "adamw", Regime("tiny", 1.0), study.optimizers["adamw"].start | hyper, 1).id

    (tmp_path / "moved").mkdir()
    here = identity()
    assert identity(STUDY.replace("[train]", "[moved/train]").replace("tokenizer.model", "moved/t.model")) == here
    assert identity(STUDY + "eval_points: 3\n") == here
    assert identity(lr=0.005) != here and identity(STUDY.replace("sequence_length: 64", "sequence_length: 32")) != here
    assert identity(STUDY.replace("[train]", "[other]")) != here


def test_schedules_become_megatrons_flags():
    cosine = schedule_flags("adamw", {"lr": 0.01, "warmup": 0.1}, 200)
    assert cosine == {"lr-decay-style": "cosine", "lr-warmup-iters": 20, "lr-decay-iters": 200, "min-lr": 0.0}
    wsd = schedule_flags("muon", {"lr": 0.01, "decay": 0.8, "min_lr_ratio": 0.1}, 200)
    assert wsd["lr-decay-style"] == "WSD" and wsd["lr-wsd-decay-iters"] == 160 and wsd["lr-warmup-iters"] == 0
    assert wsd["min-lr"] == pytest.approx(0.001)
    assert schedule_flags("adamw", {"lr": 0.01, "warmup": 4000}, 200)["lr-warmup-iters"] == 199


def test_hyperparameters_find_their_flags():
    assert flag_of("adamw", "beta1") == "adam-beta1" and flag_of("lion", "beta1") == "lion-beta1"
    assert flag_of("soap", "precondition_frequency") == "soap-precondition-frequency"
    assert flag_of("mine", "cleverness") == "mine-cleverness"
    assert argument_list({"bf16": True, "off": False, "data-path": ["a", "b"], "lr": 0.1}) == [
        "--bf16",
        "--data-path",
        "a",
        "b",
        "--lr",
        "0.1",
    ]


def test_init_writes_a_study_that_plan_reads(tmp_path, capsys):
    path = tmp_path / "new.yaml"
    assert cli.main(["init", str(path), "--optimizers", "adamw", "lion"], "study") == 0
    assert cli.main(["plan", str(path)], "study") == 0
    shown = capsys.readouterr().out
    assert "lion" in shown and "Hours are unknown" in shown
    with pytest.raises(UserError, match="exists"):
        cli.main(["init", str(path)], "study")


def test_plan_gives_hours_from_measured_or_expected_speed(make_study, tmp_path, capsys):
    path = make_study(STUDY.replace("jobs: 2", "jobs: 2\n  flops_per_s: 1e6"))
    assert cli.main(["plan", str(path)], "study") == 0
    study = read_study(path)
    model = study.models["tiny"]
    tokens = 6 * make_run(study, "adamw", Regime("tiny", 1.0), study.optimizers["adamw"].start, 1).tokens
    hours = tokens * (6 * model.non_embedding_parameters + 6 * 2 * 32 * 64) / 1e6 / 3600
    assert f"At most {hours:.2f} hours" in capsys.readouterr().out


def test_paths_start_at_the_study_file_and_variables_at_the_current_folder(make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_DATA", "built")
    monkeypatch.chdir(tmp_path.parent)
    study = read_study(make_study(STUDY.replace("[train]", '["$STUDY_DATA/train"]')))
    assert study.data.train == (str(tmp_path.parent / "built" / "train"),)
    assert study.data.valid == (str(tmp_path / "valid"),)


MOE = "num_experts: 8, moe_router_topk: 2, moe_ffn_hidden_size: 48, moe_shared_expert_intermediate_size: 16"


@pytest.mark.parametrize("place", ["model", "study"])
def test_experts_count_in_n_and_the_token_budget_and_those_met_in_flops(make_study, place):
    """Eight experts and a shared one are no dense model, wherever the flags stand."""
    tiny = "tiny: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2"
    own = f", flags: {{{MOE}}}" if place == "model" else ""
    text = STUDY.replace(tiny + "}", tiny + own + "}") + (f"flags: {{{MOE}}}\n" if place == "study" else "")
    study = read_study(make_study(text))
    router, attention, one, shared = 8 * 32, 4 * 32**2, 3 * 32 * 48, 3 * 32 * 16
    model = study.models["tiny"]
    assert model.non_embedding_parameters == 2 * (attention + router + 8 * one + shared)
    assert model.active_parameters == 2 * (attention + router + 2 * one + shared)
    assert study.tokens(Regime("tiny", 1.0)) == 20 * model.non_embedding_parameters
    assert model.flops_per_token(64, None) == 6 * model.active_parameters + 6 * 2 * 32 * 64


def test_n_is_the_cost_models(make_study):
    from megatron_opt.cost_model.flags import parse
    from megatron_opt.cost_model.model import Model

    more = {"num_experts": 4, "mtp_num_layers": 1, "attention_output_gate": True, "moe_layer_freq": 2}
    tiny = "tiny: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2"
    flags = ", ".join(f"{key}: {str(value).lower()}" for key, value in more.items())
    study = read_study(make_study(STUDY.replace(tiny + "}", f"{tiny}, flags: {{{flags}}}}}")))
    words = (
        "--preset llama --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2 --seq-length 64"
    )
    given, _ = parse([*words.split(), *"--num-experts 4 --mtp-num-layers 1 --attention-output-gate".split(),
                      "--moe-layer-freq", "2"])  # fmt: skip
    assert study.models["tiny"].non_embedding_parameters == Model.of(given).hidden_parameters


def test_a_structure_that_is_not_known_is_refused_with_its_line(make_study):
    tiny = "tiny: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2"
    text = STUDY.replace(tiny + "}", tiny + ", flags: {moe_latent_size: 8}}")
    with pytest.raises(UserError, match=r"--moe-latent-size .*non_embedding_parameters"):
        read_study(make_study(text))
    read_study(make_study(text.replace("moe_latent_size: 8}}", "moe_latent_size: 8}, non_embedding_parameters: 99}")))


WRONG = [
    ("grid: {lr: [0.004, 0.008, 0.064]}", "start: {beta_1: 0.9}\n    grid: {lr: [1, 2, 3]}", "did you mean `beta1`?"),
    ("  muon:\n", "  moun:\n", "there is no optimizer 'moun'; did you mean `muon`?"),
    ("weight_decay: 0.1", "weight_decay: -0.1", "`weight_decay: -0.1` must be"),
    ("weight_decay: 0.1", "weight_decay: 0.1, beta1: 1.5", "`beta1: 1.5` must be"),
    ("weight_decay: 0.1", "weight_decay: 0.1, schedule: cosin", "did you mean `cosine`?"),
    ("weight_decay: 0.1", "weight_decay: 0.1, min_lr_ratio: 3", "`min_lr_ratio: 3` must be"),
    ("[0.008, 0.016, 0.032]", "[0.008, 0.016, .inf]", "lr: inf"),
    ("[0.008, 0.016, 0.032]}", "[0.008, 0.016, 0.032], momentum: [1.5]}", "momentum"),
    ("[0.008, 0.016, 0.032]}", "[0.008, 0.016, 0.032], gamma: [0.5]}", "no hyperparameter `gamma`"),
    ("sequence_length: 64", "sequence_length: 64\nratios: [.001]", "raise the ratio"),
]


@pytest.mark.parametrize("old,new,words", WRONG, ids=[words for *_, words in WRONG])
def test_a_plan_checks_every_name_and_value_against_the_optimizers_own(make_study, old, new, words):
    assert old in STUDY
    text = STUDY.replace(old, new).replace('  command: [PYTHON, FAKE, "{flags}"]\n', "")
    path = make_study(text)
    with pytest.raises(UserError) as caught:
        cli.main(["plan", str(path)], "study")
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_a_plan_accepts_the_paper_and_ends_with_totals(make_study, capsys):
    entries = "".join(f"  {name}: {{grid: paper}}\n" for name in PAPER_GRIDS)
    text = (
        STUDY[: STUDY.index("optimizers:")]
        + "optimizers:\n"
        + entries
        + "phases: [descent]\ntokens_per_parameter: 2e4\n"
    )
    assert cli.main(["plan", str(make_study(text))], "study") == 0
    shown = capsys.readouterr().out
    assert "total" in shown


def test_every_rule_has_a_default_grid_that_a_plan_accepts(make_study, capsys):
    names = sorted(registry.optimizers())
    entries = "".join(f"  {name}: {{grid: default}}\n" for name in names)
    text = (
        STUDY[: STUDY.index("defaults:")] + "optimizers:\n" + entries + "phases: [descent]\ntokens_per_parameter: 2e4\n"
    )
    path = make_study(text)
    spaces = read_study(path).optimizers
    for name in names:
        grid, start = default_space(name)
        assert spaces[name].start == start and spaces[name].grid == {key: tuple(v) for key, v in grid.items()}
        assert {"lr", "batch_size"} <= set(grid) <= set(start), name
        assert name in PAPER_GRIDS or all(start[key] in values for key, values in grid.items()), name
    assert cli.main(["plan", str(path)], "study") == 0
    assert "total" in capsys.readouterr().out


def test_a_rule_of_another_package_has_no_default_grid(make_study):
    with pytest.raises(UserError, match="no default grid for 'mine'; write one"):
        read_study(make_study(STUDY.replace("muon:\n    grid: {lr: [0.008, 0.016, 0.032]}", "mine: {grid: default}")))


def test_a_plan_names_models_that_start_too_near_zero_for_their_width(make_study, capsys):
    def said(text):
        assert cli.main(["plan", str(make_study(text))], "study") == 0
        return "note: tiny: weights start with a std of" in capsys.readouterr().out

    own = STUDY.replace("  command: [PYTHON", "  environment: {}  # [PYTHON")  # the package's own trainer
    assert said(own) and said(own + "flags: {init_method_std: 0.04}\n")
    assert not said(own + "flags: {init_method_std: 0.05}\n")  # 0.28 of 1/sqrt(32)
    assert said(own.replace("  adamw:\n", "  adamw:\n    start: {init_method_std: 0.2}\n"))
    assert not said(own.replace("defaults: {", "defaults: {init_method_std: 0.2, "))
