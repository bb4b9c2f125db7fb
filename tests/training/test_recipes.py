"""--recipe: what it sets exists, is what the sources say, gives way to nothing that says otherwise."""

import pytest

from megatron_opt import recipes
from megatron_opt.cost_model import flags as cost_flags
from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.study.hyperparameters import PAPER_STARTS
from megatron_opt.training import arguments

PUBLISHED = [name for name in recipes.names() if name != "study"]
EVERY = [(name, None) for name in PUBLISHED] + [("study", optimizer) for optimizer in PAPER_STARTS]
MEGATRONS = ("optimizer", "weight-decay", "clip-grad", "qk-clip", "qk-clip-threshold")


@pytest.mark.parametrize(("name", "optimizer"), EVERY)
def test_every_flag_of_a_recipe_exists_and_takes_its_value(name, optimizer):
    words = ["--recipe", name, *(["--optimizer", optimizer] if optimizer else [])]
    found = recipes.read(name, optimizer)
    assert found.source and found.without
    flags, ignored = cost_flags.parse(words)
    assert not ignored
    used = {
        recipe_of.optimizer: registry.build(recipe_of.optimizer, dict(recipe_of.options))
        for recipe_of in cost_flags.grouping(flags)
    }
    options = cost_flags.options({key: value for key, value in flags.items() if key not in MEGATRONS})
    assert set(options) <= set(used)  # no flag of a rule that trains nothing
    rest = [key for key in found.flags if key not in MEGATRONS and not key.endswith("scalar-lr-ratio")]
    assert len(rest) == sum(len(each) for each in options.values())
    for recipe_of, values in options.items():
        assert values
        assert all(getattr(used[recipe_of].config, key) == value for key, value in values.items())
    expanded = arguments.expand(words)
    for key, value in found.flags.items():
        assert value is True or expanded[expanded.index(f"--{key}") + 1] == str(value)


def test_moonlights_step_has_adamws_size():
    flags = recipes.read("moonlight").flags
    assert (flags["muon-scale-mode"], flags["muon-extra-scale-factor"], flags["weight-decay"]) == ("spectral", 0.2, 0.1)
    kimi = recipes.read("kimi-k2")
    assert kimi.flags == flags | {"qk-clip": True, "qk-clip-threshold": 100}
    assert "--qk-clip --qk-clip-threshold 100;" in recipes.shown("kimi-k2", kimi)
    text = recipes.shown("moonlight", recipes.read("moonlight"))
    assert "--muon-extra-scale-factor 0.2" in text and "2502.16982" in text


def test_deepseeks_is_its_reports():
    """Algorithm 1 and section 4.2.2 of arXiv 2606.19348."""
    flags = recipes.read("deepseek-v4").flags
    muon = registry.build(
        "muon", {k: v for k, v in cost_flags.options(cost_flags.parse(["--recipe", "deepseek-v4"])[0])["muon"].items()}
    )
    assert muon.table == ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
    assert muon.factor(MatrixInfo("w", (64, 16))) == pytest.approx(0.18 * 8)
    assert muon.weights() == (0.95, 1.0, 0.95, 1.0)  # M = μM + G; μM + G
    assert (flags["adamw-beta1"], flags["adamw-beta2"], flags["adamw-eps"], flags["weight-decay"]) == (
        0.9,
        0.95,
        1e-20,
        0.1,
    )
    assert flags["scalar-lr-ratio"] == 1.0 and "clip-grad" not in flags


def test_a_recipe_wins_over_a_preset_and_repeats_are_welcome():
    words = arguments.expand("--preset llama-130m --recipe marin-hyperball --clip-grad 0 --optimizer muon_h".split())
    assert [words[i + 1] for i, word in enumerate(words) if word == "--clip-grad"] == ["0"]
    words = arguments.expand("--preset llama-130m --recipe marin-hyperball".split())
    assert [words[i + 1] for i, word in enumerate(words) if word == "--clip-grad"] == ["0.0"]
    recipes.of_command_line("--recipe moonlight --muon-nesterov --adam-beta2=0.950".split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe moonlight --optimizer soap", r"--optimizer soap contradicts --recipe moonlight, which sets muon"),
        ("--recipe moonlight --muon-scale-mode=none", r"--muon-scale-mode none contradicts"),
        ("--recipe moonlight --muon-nesterov false", r"--muon-nesterov false contradicts"),
        ("--recipe moonlight --muon-scalar-lr-ratio 0.3", r"--muon-scalar-lr-ratio 0.3 contradicts"),
        ("--recipe moonlight --adam-beta2 0.98", r"--adam-beta2 0.98 contradicts --recipe moonlight, which sets 0.95"),
        ("--recipe study --optimizer soap --adam-beta1 0.8", r"--adam-beta1 0.8 contradicts --recipe study"),
        ("--recipe study --optimizer muon --scalar-lr-ratio 0.3", r"--scalar-lr-ratio 0.3 contradicts"),
        ("--recipe kimi-k2 --optimizer-groups g.yaml", r"--optimizer-groups would replace the groups"),
        ("--recipe study", r"--recipe study has the tuned values of adamw, .* choose one of them by --optimizer"),
        ("--recipe study --optimizer dion", r"--recipe study has the tuned values of"),
        ("--recipe moonlihgt", r"there is no recipe 'moonlihgt'; .* Did you mean moonlight"),
        ("--recipe", r"there is no recipe"),
    ],
)  # fmt: skip
def test_contradictions_and_unknown_names_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        arguments.expand(words.split())
    with pytest.raises(UserError, match=message):
        recipes.of_command_line(words.split())


def test_a_file_of_flags_may_name_a_recipe(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("recipe: moonlight\nhidden-size: 64\n")
    flags = cost_flags.from_run(file)
    assert (flags["optimizer"], flags["muon-scale-mode"], flags["hidden-size"]) == ("muon", "spectral", 64)
    file.write_text("recipe: moonlight\noptimizer: soap\n")
    with pytest.raises(UserError, match="--optimizer soap contradicts --recipe moonlight"):
        cost_flags.from_run(file)
