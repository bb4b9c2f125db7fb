"""Every registered optimizer repeats one process's run on every kind of layout: one table, nothing to write for a new one."""

import re
from dataclasses import fields

import pytest

from megatron_opt.optimizers import registry
from tests.distributed import cases as c
from tests.distributed.cases import Case, case
from tests.distributed.compare import assert_same_curve
from tests.distributed.pool import Pool, Run

STEPS = 8
DENSE = [*c.DENSE, "--num-layers", "2"]
# options that make a rule's arithmetic comparable: fp32 throughout, no division by rounding noise
OPTIONS = {
    **{
        name: [f"--{name.replace('_', '-')}-fp32-matmul-prec", "high"]
        for name in (
            "muon",
            "muon_h",
            "scion",
            "scion_h",
            "soap_muon",
            "soap_muon_h",
            "dion2",
            "dion2_h",
            "dion3",
            "dion3_h",
        )
    },
    # whitened by 1e-4 of a mean eigenvalue, directions that 8 steps have not seen differ by 4e-5 of a norm on some processors
    "kl_soap": "--kl-soap-eigenvalue-floor 1e-2".split(),
    "schedule_free": c.CONSTANT,
    "prodigy": "--lr 1 --min-lr 0.1 --prodigy-d0 1e-3".split(),
    "mars": ["--mars-eps", "1e-3"],
    # a momentum that all but cancels has the sign of its rounding: one such element moves the loss by 1e-5 at 3e-3
    "signum": "--lr 1e-4 --min-lr 1e-5".split(),
    "sophia": "--sophia-eps 1e-4".split(),
    "shampoo": "--shampoo-damping 1e-2 --shampoo-factor-precision fp64 --shampoo-precondition-1d false".split(),
}
LAYOUTS = [c.TP2, c.DP2_DIST, c.EP2, c.PP2, c.TP2_DP2_DIST]
NAMES = sorted(registry.optimizers())


def _soon(name: str) -> list[str]:
    """What comes once in many steps comes inside the run."""
    rare = [
        one.name for one in fields(registry.optimizers()[name].Config) if re.search("_(frequency|every)$", one.name)
    ]
    return [word for one in rare for word in (f"--{name}-{one}".replace("_", "-"), "3")]


def _quick(name: str) -> list[c.Layout]:
    """Three layouts of the study's rules; of those that came later one that cuts matrices twice, none of their spheres."""
    if name.removesuffix("_h") in c.LATER:
        return [] if name.endswith("_h") else [c.TP2_DP2_DIST]
    return [c.TP2, c.DP2_DIST, c.EP2]


QUICK = [(name, layout) for name in NAMES for layout in _quick(name)]
SLOW = [(name, layout) for name in NAMES for layout in LAYOUTS if (name, layout) not in QUICK]


def _kind(layout: c.Layout) -> str:
    return "moe" if layout is c.EP2 else "dense"


def _runs(pool: Pool, pairs: list[tuple[str, c.Layout]]) -> dict[str, Run]:
    made: dict[str, Case] = {}
    for name, layout in pairs:
        flags = ["--optimizer", name, *_soon(name), *OPTIONS.get(name, [])]
        for each in (c.ONE, layout):
            title = f"{name}-{_kind(layout)}-{each.name}"
            made[title] = case(c.MOE if layout is c.EP2 else DENSE, flags, each, title, steps=STEPS)
    return pool.run(list(made.values()))


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return _runs(pool, QUICK)


@pytest.fixture(scope="module")
def slow_runs(pool: Pool) -> dict[str, Run]:
    return _runs(pool, SLOW)


@pytest.mark.parametrize(("name", "layout"), QUICK, ids=[f"{name}-{layout.name}" for name, layout in QUICK])
def test_optimizer_repeats_one_process(runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    _compare(runs, name, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), SLOW, ids=[f"{name}-{layout.name}" for name, layout in SLOW])
def test_optimizer_repeats_one_process_slow(slow_runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    _compare(slow_runs, name, layout)


def _compare(runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    found, one = (runs[f"{name}-{_kind(layout)}-{each.name}"] for each in (layout, c.ONE))
    assert_same_curve(found, one, steps=STEPS)
