"""Shapes, parameters, FLOPs and layouts against known models and against one another."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.cost_model.flags import check_effects, from_run, grouping, parse, preset
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.plan import plans
from megatron_opt.errors import UserError
from tests.cost_model.published import MODELS, flags


def model(text: str) -> Model:
    return Model.of(parse(text.split())[0])


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("--preset llama-7b", 6_738_415_616),  # Llama 2 7B
        # GPT-2 small, vocabulary padded from 50,257 to 50,304
        (MODELS["gpt2-124m"], 124_439_808 + 47 * 768),
        (MODELS["llama3-8b"], 8_030_261_248),
        (MODELS["qwen3-30b-a3b"], 30_532_110_336),
    ],
)
def test_parameters_of_known_models(text: str, parameters: int) -> None:
    assert model(text).total_parameters == parameters


@pytest.mark.parametrize(
    ("name", "published"), [("kimi-k2", 1.04e12), ("moonlight-16b", 15.3e9), ("llama3-405b", 405e9)]
)
def test_parameters_of_larger_models_by_their_papers(name: str, published: float) -> None:
    assert Model.of(flags(name, "")).total_parameters == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize(
    ("name", "hidden"), [("130m", 134_217_728), ("300m", 301_989_888), ("520m", 536_870_912), ("1.2b", 1_207_959_552)]
)
def test_hidden_matrices_are_the_studys_n(name: str, hidden: int) -> None:
    shape = model(f"--preset llama-{name}")
    matrices = [info for p in shape.parameters(0, 32) for info in shape.infos(p) if info.kind == "hidden"]
    assert sum(info.shape[0] * info.shape[1] for info in matrices) == hidden
    assert shape.hidden_parameters == hidden


def test_training_flops_are_six_a_weight_and_attention() -> None:
    shape = model("--preset llama-7b")
    weights = 6 * (shape.total_parameters - shape.vocabulary * shape.hidden - 65 * shape.hidden)  # no lookup, no norms
    attention = 3 * 32 * 4096 * 4096 * 2
    assert shape.step_flops_per_token == pytest.approx(weights + attention, rel=1e-12)


def test_a_token_meets_only_its_experts() -> None:
    shape = Model.of(flags("qwen3-30b-a3b", ""))
    assert shape.active_parameters == pytest.approx(3.35e9, rel=0.01)
    assert shape.step_flops_per_token < 8 * 3.35e9


def test_expert_layers_by_number_and_by_list() -> None:
    text = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts 4"
    assert model(text).expert_layers == {0, 1, 2, 3}
    assert model(f"{text} --moe-layer-freq 2").expert_layers == {0, 2}
    assert model(f"{text} --moe-layer-freq ([0]*1+[1]*3)").expert_layers == {1, 2, 3}
    with pytest.raises(UserError, match="names 3 layers"):
        model(f"{text} --moe-layer-freq [1]*3")


def test_layers_of_a_kind_share_shapes_under_their_own_names() -> None:
    shape = model("--preset llama-130m")
    names = {info.name for p in shape.parameters(0, 32) for info in shape.infos(p)}
    assert "decoder.layers.31.mlp.linear_fc1.weight.gate" in names
    assert "decoder.layers.7.self_attention.linear_qkv.weight.k" in names
    assert "output_layer.weight" in names and len(names) == 32 * 9 + 3


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["muon", "soap", "adamw", "lion", "scion"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3, 8]),
    st.booleans(),
)
def test_no_layout_changes_the_work_or_the_state(name: str, tp: int, pp: int, dp: int, distributed: bool) -> None:
    """FLOPs over all owners, and state where it is cut without copies, are those of one process."""
    given_flags, _ = parse(f"--preset llama-130m --num-layers 4 --optimizer {name}".split())
    shape = Model.of(given_flags)
    group_configs = grouping(given_flags)

    def totals(layout: Layout) -> tuple[float, float, int]:
        flops, state, parts = 0.0, 0.0, 0
        for stage in plans(shape, layout, group_configs):
            for shard_group in stage:
                flops += sum(shard_group.plan.flops)
                state += sum(shard_group.plan.state_bytes)
                parts += len(shard_group.plan.parts)
        return flops, state, parts

    one = totals(Layout(1, global_batch=8))
    many = totals(Layout(tp * pp * dp, tp=tp, pp=pp, distributed=distributed, global_batch=24))
    assert many[0] == pytest.approx(one[0], rel=1e-9)
    # each part of a matrix of SOAP's has an fp32 flag of its own
    assert many[1] - one[1] == (4 * (many[2] - one[2]) if name == "soap" else 0)


def test_flags_from_a_run_and_a_file(tmp_path) -> None:
    (tmp_path / "results.json").write_text(
        '{"config": {"num_layers": 2, "hidden_size": 64, "lr": 0.1, "foo": 3}, "world_size": 4}'
    )
    assert from_run(tmp_path) == {"num-layers": 2, "hidden-size": 64, "lr": 0.1, "world-size": 4}
    file = tmp_path / "flags.yaml"
    file.write_text("preset: llama-7b\nseq-length: 8192\n")
    assert from_run(file)["seq-length"] == 8192 and from_run(file)["hidden-size"] == 4096


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-layer 2", "did you mean --num-layers"),
        ("--hidden-size minus", "must be a number"),
        ("--seq-length -5", "at least 0"),
        ("--hidden-size", "needs a value"),
        ("hidden 5", "not a flag"),
        ("--preset llama-8b", "no preset"),
    ],
)
def test_bad_flags_are_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(words.split())


def test_unknown_flags_are_named_and_optimizers_options_read() -> None:
    found, ignored = parse(
        [
            "--preset",
            "demo",
            "--data-path",
            "a",
            "b",
            "--optimizer",
            "soap",
            "--soap-block-size",
            "64",
            "--log-progress",
        ]
    )
    assert ignored == ["data-path", "log-progress"]
    assert grouping(found)[0].options == {"block_size": 64}
    assert preset("demo")["swiglu"] is True
    with pytest.raises(UserError, match="no optimizer"):
        grouping({"optimizer": "sap"})


@pytest.mark.parametrize(
    ("words", "gpus", "message"),
    [
        ("--tensor-model-parallel-size 3", 6, "attention heads"),
        ("--pipeline-model-parallel-size 5", 5, "32 layers"),
        ("--tensor-model-parallel-size 8", 4, "not divisible by TP"),
        ("--global-batch-size 10", 4, "global batch"),
        ("--expert-model-parallel-size 2", 4, "needs a model with experts"),
    ],
)
def test_layouts_that_cannot_run_say_why(words: str, gpus: int, message: str) -> None:
    given_flags, _ = parse(f"--preset llama-7b {words}".split())
    with pytest.raises(UserError, match=message):
        Layout.of(given_flags, gpus, Model.of(given_flags))


@pytest.mark.parametrize(
    ("words", "other"),
    [
        ("--optimizer-offload-fraction 0.5", "--optimizer-cpu-offload"),
        ("--matrix-instances within", "--num-distributed-optimizer-instances above 1"),
        ("--matrix-balance 2 --matrix-mode owner", "--matrix-mode auto"),
        ("--fp8-recipe mxfp8", "--fp8-format"),
        ("--recompute-num-layers 1", "--recompute-granularity full"),
        ("--moe-ffn-hidden-size 64", "--num-experts"),
        ("--num-virtual-stages-per-pipeline-rank 2", "--pipeline-model-parallel-size above 1"),
    ],
)
def test_a_flag_without_effect_is_refused_as_in_a_run(words: str, other: str) -> None:
    given = f"--preset llama-7b {words}".split()
    flags, _ = parse(given)
    with pytest.raises(UserError, match=f"has no effect without {other}"):
        check_effects(flags, given)
    check_effects(flags, ["--preset", "llama-7b"])  # in a run's record all flags are there


def test_flags_that_another_one_gives_an_effect() -> None:
    given = (
        "--preset llama-7b --optimizer-cpu-offload --optimizer-offload-fraction 0.5 --use-distributed-optimizer --fp8-format "
        "e4m3 --fp8-recipe mxfp8 --num-distributed-optimizer-instances 2 --matrix-instances within --matrix-balance 2 "
        "--use-rotary-position-embeddings --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
    ).split()
    check_effects(parse(given)[0], given)


def test_hybrid_layers_have_parameters_and_no_price() -> None:
    words = "--hybrid-layer-pattern *-*- --hidden-size 64 --num-attention-heads 4 --seq-length 32"
    shape = model(words)
    assert shape.layers == 4 and shape.step_flops_per_token > 0
    with pytest.raises(UserError, match=r"--hybrid-layer-pattern \*-\*-: the cost model knows the parameters"):
        shape.priced()
