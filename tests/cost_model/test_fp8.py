"""FP8 in the cost model: bytes by hand, layers kept in bf16, gathers, casts, machines that lack a recipe."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.cost_model.cluster import load, names
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.memory import least
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.step import Step, cast_seconds, layer_seconds, permuted, predict
from megatron_opt.errors import UserError
from megatron_opt.layout.fp8 import Fp8

SEVEN = "--preset llama-7b --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --optimizer adamw"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def fp8(recipe: str, *more: str) -> str:
    return " ".join([SEVEN, "--fp8-format e4m3 --fp8-recipe", recipe, *more])


def step(words: str, machine: str = "h100", gpus: int = 64) -> Step:
    return predict(parse(words.split())[0], load(machine), gpus, exact=False)


def weights(step: Step) -> int:
    """Elements of the layers' matrices."""
    return sum(p.numel for p in step.model.parameters(0, step.model.layers) if ".linear_" in p.name)


def test_scales_by_hand() -> None:
    """300 × 500: 3 × 4 blocks, which 4 hold; 16 runs in 384 padded rows, and 9 in 512 columns."""
    assert Fp8("tensorwise").scale_bytes((300, 500)) == Fp8("delayed").scale_bytes((300, 500)) == 4
    assert Fp8("blockwise").scale_bytes((300, 500)) == 4 * (3 * 4 + 4 * 4)
    assert Fp8("mxfp8").scale_bytes((300, 512)) == 384 * 16 + 12 * 512


def test_weights_gathered_in_fp8_take_two_bytes_in_place_of_two_and_two() -> None:
    bf16, off, on = step(SEVEN), step(fp8("blockwise")), step(fp8("blockwise", "--fp8-param-gather"))
    n, quantized = bf16.model.total_parameters, weights(bf16)
    assert bf16.memory.parameters == off.memory.parameters == 2 * n and bf16.memory.fp8_weights == 0
    assert on.memory.parameters == 2 * (n - quantized)
    assert on.memory.fp8_weights == off.memory.fp8_weights == pytest.approx(quantized * (2 + 2 * 4 / 128**2), rel=1e-3)
    assert on.memory.main_copies == bf16.memory.main_copies and on.memory.gradients == bf16.memory.gradients


def test_blackwell_keeps_no_transposed_copies_of_tensors_with_one_scale() -> None:
    for recipe, bytes_of in (("tensorwise", 1), ("mxfp8", 2 + 2 / 32)):
        found = step(fp8(recipe, "--fp8-param-gather"), "b200")
        assert found.memory.fp8_weights == pytest.approx(bytes_of * weights(found), rel=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gather_of_bytes_is_half_as_long_but_for_mxfp8s(recipe: str) -> None:
    machine = "b200" if recipe == "mxfp8" else "h100"
    off, on = step(fp8(recipe), machine), step(fp8(recipe, "--fp8-param-gather"), machine)
    saved = off.traffic.sent["data parameters"] - on.traffic.sent["data parameters"]
    assert saved == pytest.approx(0 if recipe == "mxfp8" else 63 / 64 * weights(on))


def test_layers_kept_in_bf16_lie_between_bf16_and_fp8() -> None:
    kept = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 {0} --num-layers-at-end-in-bf16 {1}"
    every, some, none = (step(fp8("tensorwise", kept.format(*ends))) for ends in ((0, 0), (1, 3), (16, 16)))
    bf16 = step(SEVEN)
    assert none.forward_backward == pytest.approx(bf16.forward_backward)
    assert none.memory.total == pytest.approx(bf16.memory.total) and none.memory.fp8_weights == 0
    assert every.seconds == step(fp8("tensorwise")).seconds
    layers = every.model.layers
    share = (every.forward_backward - some.forward_backward) / (every.forward_backward - none.forward_backward)
    assert share == pytest.approx(4 / layers)
    assert some.memory.fp8_weights == pytest.approx((1 - 4 / layers) * every.memory.fp8_weights)


def test_attention_and_the_output_layer_stay_in_bf16() -> None:
    """A machine whose FP8 products cost nothing still takes their time, and that of casts."""
    machine = load("h100")
    free = {**machine.rates, "gemm": {**machine.rates["gemm"], "fp8": ((128.0, 1e30),)}}
    s = predict(parse(fp8("tensorwise").split())[0], replace(machine, rates=free), 64, exact=False)
    tokens = s.tokens / 64
    attention = 3 * tokens * s.model.layers * s.model.attention_flops() / machine.rate("attention", "bf16", 2048)
    head = 3 * tokens * s.model.output_flops() / machine.rate("layer", "bf16", 4096)
    assert s.forward_backward > (attention + head) / machine.step_efficiency
    assert s.forward_backward < 0.6 * step(SEVEN).forward_backward


def test_casts_cost_what_a_recipe_reads_and_writes() -> None:
    """A scale of the whole tensor is known after one more pass; FP8 gains less than its rate promises."""
    now, before, bf16 = (step(words).forward_backward for words in (fp8("tensorwise"), fp8("delayed"), SEVEN))
    assert before < now < bf16 < 2 * now
    assert Fp8("tensorwise").cast_bytes(True) == 6 and Fp8("tensorwise").cast_bytes(False) == 5
    assert Fp8("delayed").cast_bytes(True) == 4


@pytest.mark.parametrize("machine", [name for name in names() if "fp8" in load(name).rates["gemm"]])
def test_products_gain_what_was_measured_of_them(machine: str) -> None:
    """Transformer Engine's docs, gemm_profiling: a layer's products take 31.968 and 16.785 ms on H200, 13.102 and 6.812 on B300.

    The tensor cores' own factor is 2; rates that were fitted to runs in either format apart had said 2.4.
    """
    cluster = load(machine)
    measured = 31.968 / 16.785 if cluster.transposes else 13.102 / 6.812
    for size in (128, 512, 1024, 2048, 4096, 8192):
        gain = cluster.rate("layer", "fp8", size) / cluster.rate("layer", "bf16", size)
        assert gain == pytest.approx(measured, rel=0.01), (machine, size)


def test_block_scales_take_time_within_products() -> None:
    """Casts aside, MXFP8 takes 7.161 ms where one scale takes 6.812; of blockwise, times with casts are known."""
    assert Fp8("mxfp8").product_time(False) == pytest.approx(7.161 / 6.812, rel=0.01)
    casts = (20.285 - 16.785) / (2 * (2 + 2 + 1)) * 2 * (2 + 1 + 4 / 128)  # each operand of a product alone, one way
    assert Fp8("blockwise").product_time(True) == pytest.approx((22.882 - casts) / 16.785, rel=0.01)
    delayed = 18.978 - (20.285 - 16.785) / 10 * 2 * (2 + 1)  # the same reckoning where the answer is known: 1
    assert Fp8("delayed").product_time(True) == pytest.approx(delayed / 16.785, rel=0.01)
    machine, found = load("b200"), {}
    for recipe in ("delayed", "mxfp8"):
        s = step(fp8(recipe), "b200")
        casts = cast_seconds(s.model, s.layout, machine, False)
        found[recipe] = layer_seconds(s.model, s.layout, machine, False) - casts
    tokens, flops = s.layout.local_tokens(s.model), s.model.layer_flops(0)
    products = 3 * tokens * flops / machine.rate("layer", "fp8", min(tokens, s.model.hidden))
    assert found["mxfp8"] - found["delayed"] == pytest.approx(0.05 * products)


def test_tensorwise_scales_of_cut_inputs_are_agreed_over_their_ranks() -> None:
    """Two of inputs and two of gradients a layer, under sequence parallelism alone: latencies of small all-reduces."""
    cut = "--tensor-model-parallel-size 8"
    machine = load("h100")
    whole, shared = (step(fp8("tensorwise", cut, more)) for more in ("", "--sequence-parallel"))
    waits = cast_seconds(shared.model, shared.layout, machine, False)
    moved = cast_seconds(shared.model, replace(shared.layout, fp8=Fp8("delayed")), machine, False) * 6 / 4
    assert waits - moved == pytest.approx(4 * machine.ring(4.0, 8, kind="all_reduce"))
    assert (
        cast_seconds(whole.model, whole.layout, machine, False) > moved
    )  # more of it lies on each rank, nothing is agreed


def test_tokens_are_laid_in_the_order_of_experts_and_back() -> None:
    """By hand, elements of a token: 2 experts of 4 on 2 ranks, hidden 64."""
    words = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts 4 --moe-router-topk 2"
    )
    words += " --expert-model-parallel-size 2 --vocab-size 128"
    flags = [parse(f"{words} --moe-token-dispatcher-type {kind}".split())[0] for kind in ("alltoall", "flex")]
    model = Model.of(flags[0])
    sent, met = (permuted(model, Layout.of(one, 2, model)) for one in flags)
    assert sent == 64 * ((1 + 2) + (2 + 2) + (2 + 2) + (2 + 1))  # copied, sorted, sorted back, summed
    assert met == 64 * ((1.5 + 2) + (2 + 1.5))  # a token meets 1.5 ranks


def test_fp8_fills_up_the_rows_of_experts_unless_the_dispatcher_has() -> None:
    """Read and written before the products and after, 2 experts a token of 64."""
    words = (
        "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --num-experts 4 --moe-router-topk 2 --bf16 "
        "--expert-model-parallel-size 2 --vocab-size 128 --moe-token-dispatcher-type flex"
    )
    in_fp8 = f"{words} --fp8-format e4m3 --fp8-recipe mxfp8"
    flags = [parse(w.split())[0] for w in (words, in_fp8, f"{in_fp8} --moe-flex-dispatcher-backend hybridep")]
    model = Model.of(flags[0])
    plain, filled, laid = (permuted(model, Layout.of(one, 2, model)) for one in flags)
    assert filled - plain == 64 * (2 + 2 + 2 + 2) and laid == plain


@pytest.mark.parametrize("words, machine, said", [
    (fp8("mxfp8"), "h100", "--fp8-recipe mxfp8 is not computed by GPUs of compute capability 9.0"),
    (fp8("tensorwise"), "a100", "a100 has no rate of FP8 products; leave out --fp8-format"),
    (fp8("custom"), "h100", "--fp8-recipe"),
])  # fmt: skip
def test_what_a_machine_lacks_is_refused(words: str, machine: str, said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        step(words, machine)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(RECIPES), st.booleans(), st.booleans(), st.sampled_from(["b200", "gb300"]), st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]), st.sampled_from(["", "--recompute-granularity full", "--mtp-num-layers 1"]),
)  # fmt: skip
def test_a_searchs_lower_bound_holds_in_fp8(
    recipe: str, gathered: bool, kept: bool, machine: str, tp: int, pp: int, more: str
) -> None:
    words = fp8(recipe, "--fp8-param-gather" * gathered, "--first-last-layers-bf16" * kept, more)
    words += f" --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    flags, cluster = parse(words.split())[0], load(machine)
    model = Model.of(flags)
    found = predict(flags, cluster, 64, exact=False)
    assert least(model, Layout.of(flags, 64, model), cluster) <= found.memory.total * (1 + 1e-9)
