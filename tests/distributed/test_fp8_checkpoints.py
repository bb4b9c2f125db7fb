"""Checkpoints of weights kept in FP8: other layouts by value, in the background, weights alone, to bf16 and from it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_moved
from tests.distributed.pool import Pool, Run
from tests.distributed.test_fp8 import GQA, ONE, PP2, RECIPES, STEPS, TP2, check_bytes, fp8, gathered
from tests.distributed.test_transformer_engine import PACKAGES

pytestmark = pytest.mark.skipif(not PACKAGES.is_dir(), reason=f"requirements-te.txt is not installed in {PACKAGES}")

STOP = 2  # the step whose checkpoint is read
DP2 = c.DP2_DIST
SOAP = [*c.SOAP, "--soap-precondition-frequency", "1"]
OFF = fp8(GQA, "tensorwise")
ON = [*OFF, *gathered("tensorwise")]
DELAYED = fp8(GQA, "delayed")
ASYNC = "--async-save"


def _saves(
    name: str, flags: list[str], layout: Layout, folder: Path, optimizer: list[str] = c.ADAMW, stop: int = 0
) -> Case:
    """A run with a checkpoint of every step, which may be stopped; FP8 numbers are looked at after every step."""
    options: dict[str, object] = {"save": str(folder / name), "interval": 1} | ({"stop": stop} if stop else {})
    return case(flags, optimizer, layout, name, steps=STEPS, hook="weights", options=options)


def _loads(
    name: str, source: str, flags: list[str], layout: Layout, folder: Path, optimizer: list[str] = c.ADAMW
) -> Case:
    flags = [*flags, "--ckpt-step", str(STOP)]
    return case(flags, optimizer, layout, name, steps=STEPS, hook="weights", options={"load": str(folder / source)})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("fp8"), 2, PACKAGES, transformer_engine=True)
    yield made
    made.close()


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Saved: bf16, FP8 with the flag, in the background, delayed and TP2; then what goes on from each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = pool.run(
        [
            _saves("bf16", GQA, DP2, folder),
            _saves("on", ON, DP2, folder),
            _saves("background", [*ON, ASYNC], DP2, folder),
            _saves("delayed", [*DELAYED, *gathered("delayed")], DP2, folder),
            _saves("delayed-off", DELAYED, DP2, folder),
            _saves("tp2", ON, TP2, folder, SOAP, STOP),
        ]
    )
    alone = "--finetune"
    return made | pool.run(
        [
            _loads("bf16-to-on", "bf16", ON, DP2, folder),
            _loads("bf16-to-off", "bf16", OFF, DP2, folder),
            _loads("on-to-bf16", "on", GQA, DP2, folder),
            _loads("bf16-alone-on", "bf16", [*ON, alone], DP2, folder),
            _loads("bf16-alone-off", "bf16", [*OFF, alone], DP2, folder),
            _loads("on-alone-on", "on", [*ON, "--no-load-optim"], DP2, folder),
            _loads("on-alone-off", "on", [*OFF, "--no-load-optim"], DP2, folder),
            _loads("background-alone-off", "background", [*OFF, "--no-load-optim"], DP2, folder),
            _loads("delayed-resumed", "delayed", [*DELAYED, *gathered("delayed")], DP2, folder),
            _loads("bf16-to-delayed", "bf16", [*DELAYED, *gathered("delayed")], DP2, folder),
            _loads("bf16-to-delayed-off", "bf16", DELAYED, DP2, folder),
            _loads("tp2-to-dp2", "tp2", ON, DP2, folder, SOAP),
        ]
    )


@pytest.mark.parametrize("found, wanted", [
    ("bf16-to-on", "bf16-to-off"),  # a checkpoint of a bf16 run
    ("bf16-alone-on", "bf16-alone-off"),  # its weights, without the optimizer's state
    ("on-alone-on", "on-alone-off"),  # weights in FP8 without it
    ("background-alone-off", "on-alone-off"),  # saved in the background
    ("bf16-to-delayed", "bf16-to-delayed-off"),  # histories begin anew
    ("background", "on"),
    ("delayed", "delayed-off"),
])  # fmt: skip
def test_the_flag_changes_nothing(runs: dict[str, Run], found: str, wanted: str) -> None:
    assert len(runs[wanted].losses) >= STEPS - STOP
    assert runs[found].losses == runs[wanted].losses and runs[found].grad_norms == runs[wanted].grad_norms


def test_delayed_scaling_resumes_bit_for_bit(runs: dict[str, Run]) -> None:
    assert runs["delayed-resumed"].losses == runs["delayed"].losses[STOP:]


def test_a_checkpoint_of_fp8_weights_goes_on_in_bf16(runs: dict[str, Run]) -> None:
    """From the main copies: within what FP8 products differ by."""
    actual, wanted = runs["on-to-bf16"].losses, runs["on"].losses[STOP:]
    assert actual == pytest.approx(wanted, rel=5e-3) and actual != wanted


def test_main_copies_and_state_move_by_value(runs: dict[str, Run]) -> None:
    """And FP8 numbers and scales are those of the loaded main copies, before a step and after."""
    assert_moved(runs["tp2"], runs["tp2-to-dp2"])
    check_bytes(runs["tp2-to-dp2"])


LAYOUTS = {"one": ONE, "dp2": DP2, "tp2": TP2, "pp2": PP2}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, "delayed"])
def test_main_copies_and_state_move_by_value_between_all_layouts(pool: Pool, tmp_path: Path, recipe: str) -> None:
    flags = [*fp8(GQA, recipe), *gathered(recipe)]
    made = pool.run([_saves(name, flags, layout, tmp_path, SOAP, STOP) for name, layout in LAYOUTS.items()])
    moves = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
    made |= pool.run([_loads(f"{a}-to-{b}", a, flags, LAYOUTS[b], tmp_path, SOAP) for a, b in moves])
    for a, b in moves:
        assert_moved(made[a], made[f"{a}-to-{b}"])
        check_bytes(made[f"{a}-to-{b}"])
