"""FP8 recipes on CPU: quantizers bit for bit, losses near bf16's, layouts, resuming, layers kept in bf16."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

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


def test_sizes_that_do_not_fit_are_refused_at_start(runs: dict[str, Run]) -> None:
    assert "--hidden-size 80 is 80 in FP8 products, which --fp8-recipe mxfp8" in str(runs["odd"].user_errors[0])


@pytest.mark.slow
def test_recipes_on_layouts(pool: Pool, tmp_path: Path) -> None:
    """Dense and experts on DP, TP and EP, gradients in E5M2, a resume: every recipe of blocks."""
    wanted = []
    for recipe in BLOCKS:
        flags, experts = fp8(GQA, recipe), fp8(MOE, recipe)
        wanted += [_saving(recipe, tmp_path), _case(f"{recipe}-hybrid", fp8(GQA, recipe, "hybrid"))]
        wanted += [_case(f"{recipe}-{layout.name}", flags, layout) for layout in (c.DP2_DIST, c.TP2, c.PP2)]
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
        assert runs[f"{recipe}-resumed"].losses == one.losses[STOP:]
        assert runs[f"{recipe}-kept"].losses not in (one.losses, runs["bf16"].losses)
