"""Every registered optimizer's weights and state, by value, from one layout to another: four pairs each."""

from typing import Any

import pytest

from megatron_opt.optimizers import registry
from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_moved
from tests.distributed.pool import Pool, Run

NAMES = sorted(registry.optimizers())
DENSE = [*c.DENSE, "--num-layers", "2"]
PAIRS = [(c.TP2, c.PP2), (c.PP2, c.DP2_DIST), (c.DP2_DIST, c.ONE), (c.ONE, c.TP2)]
Move = tuple[str, Layout, Layout]


def _quick(name: str) -> list[tuple[Layout, Layout]]:
    """Two pairs of the study's rules, one of those that came later, none of their spheres."""
    if name.removesuffix("_h") in c.LATER:
        return [] if name.endswith("_h") else PAIRS[:1]
    return PAIRS[:2]


QUICK = [(name, *pair) for name in NAMES for pair in _quick(name)]
SLOW = [(name, *pair) for name in NAMES for pair in PAIRS if (name, *pair) not in QUICK]
STEPS = 2
# a curvature estimate, a refresh of factors before the checkpoint
OPTIONS = {
    "sophia": ["--sophia-curvature-every", "1"],
    "schedule_free": c.CONSTANT,
    "soap": ["--soap-precondition-frequency", "1"],
    "kl_soap": ["--kl-soap-precondition-frequency", "1"],
    "soap_muon": ["--soap-muon-precondition-frequency", "1"],
    "shampoo": ["--shampoo-precondition-frequency", "1"],
}


def _case(name: str, layout: Layout, what: str, **options: str | int) -> Case:
    flags = ["--optimizer", name, *OPTIONS.get(name, [])]
    return case(
        DENSE, flags, layout, f"{what}-{name}-{layout.name}", steps=STEPS + 1, hook="checkpoint", options=options
    )


def _make(pool: Pool, moves: list[Move]) -> dict[str, Run]:
    saving = [_case(n, a, "save", save=f"moved-{n}-{a.name}", interval=STEPS, stop=STEPS) for n, a, _ in moves]
    return pool.run(saving) | pool.run([_case(n, b, "load", load=f"moved-{n}-{a.name}") for n, a, b in moves])


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return _make(pool, QUICK)


@pytest.fixture(scope="module")
def slow_runs(pool: Pool) -> dict[str, Run]:
    return _make(pool, SLOW)


def _ids(moves: list[Move]) -> list[str]:
    return [f"{name}-{a.name}-to-{b.name}" for name, a, b in moves]


@pytest.mark.parametrize(("name", "a", "b"), QUICK, ids=_ids(QUICK))
def test_state_moves_by_value(runs: dict[str, Run], name: str, a: Layout, b: Layout) -> None:
    _assert_moved(runs, name, a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "a", "b"), SLOW, ids=_ids(SLOW))
def test_state_moves_by_value_slow(slow_runs: dict[str, Run], name: str, a: Layout, b: Layout) -> None:
    _assert_moved(slow_runs, name, a, b)


def _assert_moved(runs: dict[str, Run], name: str, a: Layout, b: Layout) -> None:
    saved, loaded = runs[f"save-{name}-{a.name}"], runs[f"load-{name}-{b.name}"]
    assert len(loaded.losses) == 1 and {rank["loaded_step"] for rank in loaded.ranks} == {STEPS}
    assert_moved(saved, loaded)


def test_a_hybrid_models_state_moves_by_value(pool: Pool) -> None:
    """Attention, MLP and experts of Megatron's HybridModel, from tensor-parallel ranks to pipeline stages."""
    more: dict[str, Any] = {"steps": STEPS + 1, "hook": "checkpoint"}
    saving = {"save": "moved-hybrid", "interval": STEPS, "stop": STEPS}
    first = case(c.HYBRID, c.MUON, c.SP2, "save-muon-hybrid", options=saving, **more)
    then = case(c.HYBRID, c.MUON, c.PP2, "load-muon-hybrid", options={"load": "moved-hybrid"}, **more)
    runs = pool.run([first]) | pool.run([then])
    _assert_moved(runs, "muon", Layout("hybrid", 2), Layout("hybrid", 2))
