"""FP8 on CPU: quantizers bit for bit, losses near bf16's, layouts, resuming, layers kept in bf16, weights kept in FP8."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opt.cost_model.flags import grouping, parse
from megatron_opt.cost_model.layout import Layout as PlannedLayout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.plan import plans
from megatron_opt.optimizers import registry
from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.pool import Pool, Run
from tests.distributed.test_transformer_engine import PACKAGES, TE

pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"requirements-te.txt is not installed in {PACKAGES}")

STEPS, STOP = 3, 1
BF16 = [*TE, "--bf16", "--hidden-size", "64", "--num-layers", "2"]
GQA = [*c.GQA, *BF16]
MOE = [*c.MOE, *BF16, "--moe-ffn-hidden-size", "64", "--moe-grouped-gemm"]
KEPT = "--first-last-layers-bf16 --num-layers-at-start-in-bf16 {0} --num-layers-at-end-in-bf16 {1}"
BLOCKS = ("blockwise", "mxfp8")


def fp8(model: Sequence[str], recipe: str, form: str = "e4m3") -> list[str]:
    return [*model, "--fp8-format", form, "--fp8-recipe", recipe]


def _case(name: str, flags: Sequence[str], layout: Layout = c.ONE, **more: object) -> Case:
    return case(flags, c.MUON, layout, name, steps=STEPS, **more)


def _saving(recipe: str, folder: Path) -> Case:
    """A run with a checkpoint of every step."""
    return _case(recipe, fp8(GQA, recipe), hook="checkpoint", options={"save": str(folder / recipe), "interval": 1})


def _resumed(recipe: str, folder: Path) -> Case:
    options, flags = {"load": str(folder / recipe)}, [*fp8(GQA, recipe), "--ckpt-step", str(STOP)]
    return _case(f"{recipe}-resumed", flags, hook="checkpoint", options=options)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("fp8"), 2, PACKAGES, transformer_engine=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, mx = tmp_path_factory.mktemp("checkpoints"), fp8(GQA, "mxfp8")
    wanted = [_case("bf16", GQA, hook="quantizers"), _case("moe-bf16", MOE), _case("moe-mxfp8", fp8(MOE, "mxfp8"))]
    wanted += [_case("blockwise", fp8(GQA, "blockwise")), _saving("mxfp8", folder)]
    wanted += [_case("kept-1-1", [*mx, *KEPT.format(1, 1).split()])]
    wanted += [_case("odd", [*mx, "--hidden-size", "80"])]
    wanted += [_case(layout.name, [*mx, "--seq-length", "32"], layout) for layout in (c.TP2, c.SP2)]
    counted = [*mx, "--log-fp8-ranges", "--log-interval", "1"]
    wanted += [_case(f"ranges-{layout.name}", counted, layout, hook="ranges") for layout in (c.ONE, c.DP2_DIST, c.TP2)]
    wanted += [_case("ranges-moe", [*fp8(MOE, "mxfp8"), "--log-fp8-ranges", "--log-interval", "2"], hook="ranges")]
    return pool.run(wanted) | pool.run([_resumed("mxfp8", folder)])


def test_quantizers_equal_references_bit_for_bit(runs: dict[str, Run]) -> None:
    """Rows and columns, numbers and scales, in both formats, over the whole range of bf16."""
    assert runs["bf16"].losses  # no error
    (rank,) = runs["bf16"].ranks
    assert len(rank["faults"]) == 8 and not any(rank["faults"].values()), rank["faults"]


def test_products_are_exact(runs: dict[str, Run]) -> None:
    assert runs["bf16"].ranks[0]["product_error"] < 2**-23  # one rounding to fp32


@pytest.mark.parametrize("ours, theirs", [("blockwise", "bf16"), ("mxfp8", "bf16"), ("moe-mxfp8", "moe-bf16")])
def test_losses_are_near_bf16_and_other_numbers(runs: dict[str, Run], ours: str, theirs: str) -> None:
    found, wanted = runs[ours].losses, runs[theirs].losses
    assert len(found) == STEPS and found == pytest.approx(wanted, rel=1e-2) and found != wanted


def test_a_resumed_run_goes_on_as_if_uninterrupted(runs: dict[str, Run]) -> None:
    assert runs["mxfp8-resumed"].losses == runs["mxfp8"].losses[STOP:]


def test_layers_kept_in_bf16(runs: dict[str, Run]) -> None:
    """Both of two: bf16's losses to the bit."""
    assert runs["kept-1-1"].losses == runs["bf16"].losses


def test_sequence_parallelism_gathers_numbers_and_scales(runs: dict[str, Run]) -> None:
    """MXFP8's runs of 32 are not cut by it."""
    assert runs["tp2-sp"].losses == pytest.approx(runs["tp2"].losses, rel=1e-6)


def test_sizes_that_do_not_fit_are_refused_at_start(runs: dict[str, Run]) -> None:
    assert "--hidden-size 80 is 80 in FP8 products, which --fp8-recipe mxfp8" in str(runs["odd"].user_errors[0])


def test_ranges_in_the_log(runs: dict[str, Run]) -> None:
    """Counts are those of the formats' definition; in the first step DP changes none, TP only sums that are rounded apart."""
    one, dp, tp = (runs[f"ranges-{name}"] for name in ("one", "dp2-distopt", "tp2"))
    assert one.losses == runs["mxfp8"].losses and one.ranks[0]["range_faults"] == []
    assert [len(run.ranks[0]["ranges"]) for run in (one, dp, tp)] == [STEPS] * 3
    first, spread = one.ranks[0]["ranges"][0], 0.0
    assert set(first) == {"qkv", "proj", "fc1", "fc2"}
    assert all(set(of) == {"activation", "weight", "gradient"} for of in first.values())
    assert dp.ranks[0]["ranges"] == dp.ranks[1]["ranges"]
    # a rank's loss is its own microbatches' mean: gradients of twice the size
    for kind, of in dp.ranks[0]["ranges"][0].items():
        of["gradient"]["amax"] /= 2
        assert of == first[kind]
    for kind, of in first.items():
        assert tp.ranks[1]["ranges"][0][kind]["weight"] == of["weight"]
        for tensor, found in of.items():
            other = tp.ranks[0]["ranges"][0][kind][tensor]
            assert other["underflows"] == pytest.approx(found["underflows"], abs=1e-3)
            assert other["amax"] == pytest.approx(found["amax"], rel=0.1) and other["overflows"] == 0
            spread += found["underflows"]
    assert spread > 0
    moe = runs["ranges-moe"].ranks[0]["ranges"]  # steps 2 and the last
    assert len(moe) == 2 and {"experts_fc1", "experts_fc2"} < set(moe[0]) and "fc1" not in moe[0]


@pytest.mark.slow
def test_recipes_on_layouts(pool: Pool, tmp_path: Path) -> None:
    """Dense and experts on DP, TP and EP, gradients in E5M2, a resume: every recipe of blocks."""
    wanted = []
    for recipe in BLOCKS:
        flags, experts = fp8(GQA, recipe), fp8(MOE, recipe)
        wanted += [_saving(recipe, tmp_path), _case(f"{recipe}-hybrid", fp8(GQA, recipe, "hybrid"))]
        wanted += [_case(f"{recipe}-{layout.name}", flags, layout) for layout in (c.DP2_DIST, c.TP2, c.PP2)]
        wide = ["--hidden-size", "128", "--num-attention-heads", "8", "--seq-length", "128"]  # runs of 128 on a rank
        wanted += [_case(f"{recipe}-{at.name}-wide", [*flags, *wide], at) for at in (c.TP2, c.SP2)]
        wanted += [_case(f"{recipe}-kept", [*flags, *KEPT.format(1, 0).split()])]
        wanted += [_case(f"moe-{recipe}", experts), _case(f"moe-{recipe}-ep2", experts, c.EP2)]
    runs = pool.run(wanted)
    runs |= pool.run([_case("bf16", GQA), *(_resumed(recipe, tmp_path) for recipe in BLOCKS)])
    for recipe in BLOCKS:
        one, hybrid = runs[recipe], runs[f"{recipe}-hybrid"]
        assert one.losses[0] == hybrid.losses[0] and one.grad_norms[0] != hybrid.grad_norms[0]
        assert runs[f"{recipe}-dp2-distopt"].losses == pytest.approx(one.losses, rel=1e-6)
        assert runs[f"{recipe}-pp2"].losses == pytest.approx(one.losses, rel=1e-6)
        # an expert's product has the tokens of two ranks: other tokens share a scale
        assert runs[f"moe-{recipe}-ep2"].losses == pytest.approx(runs[f"moe-{recipe}"].losses, rel=2e-3)
        assert runs[f"{recipe}-tp2"].losses == pytest.approx(one.losses, rel=2e-3)  # partial sums round to bf16
        assert runs[f"{recipe}-tp2-sp-wide"].losses == pytest.approx(runs[f"{recipe}-tp2-wide"].losses, rel=1e-5)
        assert runs[f"{recipe}-resumed"].losses == one.losses[STOP:]
        assert runs[f"{recipe}-kept"].losses not in (one.losses, runs["bf16"].losses)


ONE = Layout.of("one", 1, distopt=True)
TP2 = Layout.of("tp2", 2, tp=2, distopt=True)
PP2 = Layout.of("pp2", 2, pp=2, distopt=True)
TWICE = Layout.of("dp2-twice", 2, distopt=True, more=c.ACROSS)
OVERLAP = Layout.of("dp2-overlap", 2, distopt=True, more=("--overlap-grad-reduce", "--overlap-param-gather"))
OPTIMIZERS = {
    "adamw": c.ADAMW,
    "muon": c.MUON,
    "soap": c.SOAP,
    "schedule_free": ["--optimizer", "schedule_free", *c.CONSTANT],
}
RECIPES = ("tensorwise", "blockwise", "mxfp8")
RULES = sorted(registry.optimizers())


def gathered(recipe: str) -> list[str]:
    return ["--fp8-param-gather", *(["--reuse-grad-buf-for-mxfp8-param-ag"] if recipe == "mxfp8" else [])]


def pair(
    recipe: str,
    rule: str,
    layout: Layout,
    model: Sequence[str] = GQA,
    name: str = "",
    optimizer: Sequence[str] = (),
) -> tuple[Case, Case]:
    """The run without the flag and with it; `optimizer`: flags in place of the rule's."""
    flags, optimizer = fp8(model, recipe), optimizer or OPTIMIZERS.get(rule, ["--optimizer", rule])
    name = f"{name}{recipe}-{rule}-{layout.name}"
    on = case([*flags, *gathered(recipe)], optimizer, layout, f"{name}-on", steps=STEPS, hook="weights")
    return case(flags, optimizer, layout, f"{name}-off", steps=STEPS, hook="held_bytes"), on


def check_pair(runs: dict[str, Run], off: Case, on: Case) -> None:
    """The same run, and the memory that the plan says."""
    check_same(runs, off, on)
    check_plan(runs[off.name])
    check_plan(runs[on.name])


def check_same(runs: dict[str, Run], off: Case, on: Case) -> None:
    """Losses, gradient norms and weights to the bit, FP8 numbers those of the reference."""
    without, with_it = runs[off.name], runs[on.name]
    assert with_it.losses == without.losses and with_it.grad_norms == without.grad_norms, on.name
    expected = without.weights
    assert all((value == expected[name]).all() for name, value in with_it.weights.items())
    if on.layout is not OVERLAP:  # where other ranks' shards come with the next forward pass
        check_bytes(with_it)


def check_plan(run: Run) -> None:
    """Bytes of parameters, and of FP8 numbers, copies by column and scales, are those that the cost model predicts."""
    flags, _ = parse(run.case.argv("data"))
    model = Model.of(flags)
    layout = PlannedLayout.of(flags, run.case.ranks, model)
    for stage, ranks in zip(plans(model, layout, grouping(flags)), _by_stage(run), strict=True):
        assert layout.fp8 is not None
        quantized = sum(shard_group.quantized for shard_group in stage)
        plain = sum(shard_group.local_elements for shard_group in stage) - (quantized if layout.fp8.gathered else 0.0)
        in_fp8 = quantized * layout.fp8.copies(transposes=True) + sum(shard_group.scales for shard_group in stage)
        for rank in ranks:
            assert rank["held_bytes"] == [2 * plain, in_fp8], run.case.name


def _by_stage(run: Run) -> list[list[dict[str, object]]]:
    """Ranks of each pipeline stage, whose ranks follow one another."""
    flags, _ = parse(run.case.argv("data"))
    size = run.case.ranks // int(flags.get("pipeline-model-parallel-size") or 1)
    return [run.ranks[first : first + size] for first in range(0, run.case.ranks, size)]


def check_bytes(run: Run) -> None:
    for rank in run.ranks:
        assert len(rank["fp8_weights"]) >= 1 and all(count > 0 and not faults for count, faults in rank["fp8_weights"])


# the weights are gathered by passes, and before evaluations and checkpoints
EVALUATED = ["--eval-interval", "2", "--eval-iters", "1"]
LATE = pair("mxfp8", "adamw", OVERLAP, [*GQA, *EVALUATED], "evaluated-")
QUICK = [
    pair("tensorwise", "adamw", c.DP2_DIST),
    pair("delayed", "muon", TP2),
    pair("mxfp8", "muon", TP2, [*GQA, "--qk-clip", "--qk-clip-threshold", "0.5"]),  # scaled before they are published
    pair("mxfp8", "muon", TWICE),
    pair(
        "tensorwise", "adamw", ONE, [*GQA, "--num-layers", "1", "--megatron-init"], "drawn-"
    ),  # by Megatron's generators
]


def _weights(name: str, layout: Layout, *flags: str, **options: object) -> Case:
    """Weights in FP8 by tensorwise scales under AdamW, which `QUICK` has on DP2."""
    model = [*fp8(GQA, "tensorwise"), *gathered("tensorwise"), *flags]
    return case(model, c.ADAMW, layout, name, steps=STEPS, hook="weights", options=options)


@pytest.fixture(scope="module")
def fp8_weights(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = str(tmp_path_factory.mktemp("fp8-weights") / "tp2")
    made = pool.run([one for both in QUICK for one in both] + [_weights("tp2", TP2, save=folder, interval=1)])
    at = ("--ckpt-step", str(STOP))
    return made | pool.run([_weights("resumed", TP2, *at, load=folder)])


def test_weights_in_fp8_that_passes_gather_change_nothing(pool: Pool) -> None:
    """MXFP8 weights share memory with gradients; an evaluation after the second of three steps gathers them, too."""
    both = [replace(one, flags=(*one.flags, "--valid-data-path", pool.data), steps=4) for one in LATE]
    check_pair(pool.run(both), *both)


@pytest.mark.parametrize("both", QUICK, ids=[on.name for _, on in QUICK])
def test_weights_in_fp8_change_nothing(fp8_weights: dict[str, Run], both: tuple[Case, Case]) -> None:
    check_pair(fp8_weights, *both)


def test_a_weights_scale_is_the_whole_matrixs_under_tensor_parallelism(fp8_weights: dict[str, Run]) -> None:
    """Bytes are those of one process; losses differ by partial sums."""
    check_bytes(fp8_weights["tp2"])
    one = fp8_weights["tensorwise-adamw-dp2-distopt-on"].losses
    assert fp8_weights["tp2"].losses == pytest.approx(one, rel=2e-3)


def test_weights_in_fp8_resume_bit_for_bit(fp8_weights: dict[str, Run]) -> None:
    assert fp8_weights["resumed"].losses == fp8_weights["tp2"].losses[STOP:]
    check_bytes(fp8_weights["resumed"])


def test_weights_in_fp8_change_nothing_for_every_rule(pool: Pool) -> None:
    """One layer on one rank with the distributed optimizer."""
    pairs = [pair("tensorwise", optimizer, ONE, [*GQA, "--num-layers", "1"]) for optimizer in RULES]
    found = pool.run([one for both in pairs for one in both])
    for both in pairs:
        check_pair(found, *both)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("fp8-four"), 4, PACKAGES, transformer_engine=True)
    yield made
    made.close()


ROLES = ("q", "k", "v", "attention_output", "gate", "up", "down")
AT_ONCE = [RULES[at : at + len(ROLES)] for at in range(0, len(RULES), len(ROLES))]  # a role of both layers each


def _mixed(
    folder: Path, rules: Sequence[str], recipe: str, layout: Layout, model: Sequence[str] = GQA
) -> tuple[Case, Case]:
    """A pair in which each role's matrices have a rule of their own, another in every recipe; two steps."""
    turn = (*RECIPES, "delayed").index(recipe)
    lines = [f'  - {{match: "role={ROLES[(i + turn) % len(ROLES)]}", optimizer: {rule}, weight_decay: false, clip: false}}'
             for i, rule in enumerate(rules)]  # fmt: skip
    file = folder / f"{recipe}.yaml"
    file.write_text("\n".join(["groups:", *lines, '  - {match: ".*", optimizer: adamw, clip: true}', ""]))
    optimizer = ["--optimizer", "adamw", "--optimizer-groups", str(file), *c.CONSTANT]
    name = "mixed-moe" if model is MOE else "mixed"
    off, on = pair(recipe, name, layout, model, optimizer=optimizer)
    return replace(off, steps=2), replace(on, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("rules", AT_ONCE, ids=lambda rules: "-".join((rules[0], rules[-1])))
def test_weights_in_fp8_change_nothing_for_every_rule_recipe_and_layout(
    pool: Pool, tmp_path: Path, rules: Sequence[str]
) -> None:
    """The second pass computes with what was published, and what was last published is looked at.

    Under TP a tensorwise scale is the whole matrix's with the flag, a shard's without: that pair agrees by its bytes alone.
    """
    scaled = _mixed(tmp_path, rules, "tensorwise", TP2)
    pairs = [_mixed(tmp_path, rules, recipe, layout) for recipe in RECIPES for layout in (c.DP2_DIST, TP2, PP2)]
    pairs += [_mixed(tmp_path, rules, recipe, c.EP2_DIST, MOE) for recipe in RECIPES]
    pairs += [_mixed(tmp_path, rules, "delayed", c.DP2_DIST)]
    found = pool.run([one for both in pairs for one in both])
    for both in pairs:
        if both != scaled:
            check_same(found, *both)
    off, on = (found[one.name] for one in scaled)
    check_bytes(on)
    assert on.losses == pytest.approx(off.losses, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("rules", AT_ONCE, ids=lambda rules: "-".join((rules[0], rules[-1])))
def test_weights_in_fp8_change_nothing_for_every_rule_on_four_ranks(
    four: Pool, tmp_path: Path, rules: Sequence[str]
) -> None:
    """TP2 × DP2 (tensorwise: PP2 × DP2), and two instances of the distributed optimizer."""
    chosen = [("mxfp8", c.TP2_DP2_DIST), ("blockwise", c.TP2_DP2_DIST), ("tensorwise", c.PP2_DP2_DIST)]
    chosen += [("tensorwise", c.DP2X2), ("blockwise", c.DP2X2_WITHIN), ("mxfp8", c.DP2X2)]
    pairs = [_mixed(tmp_path, rules, recipe, layout) for recipe, layout in chosen]
    found = four.run([one for both in pairs for one in both])
    for both in pairs:
        check_same(found, *both)


@pytest.mark.slow
def test_weights_in_fp8_change_nothing_for_optimizers_recipes_and_layouts(pool: Pool) -> None:
    """Every pair of the matrix is the same run to the bit."""
    layouts = {"tensorwise": (ONE, c.DP2_DIST, PP2, OVERLAP), "blockwise": (c.DP2_DIST, TP2, PP2, OVERLAP),
               "mxfp8": (c.DP2_DIST, TP2, PP2, OVERLAP), "delayed": (c.DP2_DIST, TP2, PP2, OVERLAP)}  # fmt: skip
    pairs = [pair(r, o, layout) for r in layouts for o in OPTIMIZERS for layout in layouts[r]]
    pairs += [pair(recipe, "muon", c.EP2_DIST, MOE, "moe-") for recipe in layouts]
    pairs += [pair(recipe, "adamw", c.DP2_DIST, [*GQA, "--megatron-init"], "drawn-") for recipe in layouts]
    pairs += [pair("mxfp8", "adamw", c.EP2_DIST, [*MOE, "--megatron-init"], "drawn-moe-")]
    found = pool.run([one for both in pairs for one in both])
    for both in pairs:
        check_pair(found, *both)
