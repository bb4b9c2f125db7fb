"""Every registered optimizer repeats one process's run on every kind of layout: one table, nothing to write for a new one."""

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
        for name in ("muon", "muon_h", "scion", "scion_h")
    },
    "mars": ["--mars-eps", "1e-3"],
    # what comes once in many steps comes inside the run
    "sophia": "--sophia-eps 1e-4 --sophia-curvature-every 3".split(),
    "soap": "--soap-precondition-frequency 3".split(),
    "soap_h": "--soap-h-precondition-frequency 3".split(),
    "shampoo_h": "--shampoo-h-precondition-frequency 3".split(),
    "shampoo": "--shampoo-damping 1e-2 --shampoo-factor-precision fp64 --shampoo-precondition-1d false "
    "--shampoo-precondition-frequency 3".split(),
}
LAYOUTS = [c.TP2, c.DP2_DIST, c.EP2]
SLOW = [c.PP2, c.TP2_DP2_DIST]


def _cases(name: str, layouts: list[c.Layout]) -> list[Case]:
    flags = ["--optimizer", name, *OPTIONS.get(name, [])]
    made = []
    for model, which in ((DENSE, [each for each in layouts if each is not c.EP2]), (c.MOE, [c.EP2])):
        if set(which) & set(layouts):
            kind = "moe" if model is c.MOE else "dense"
            made += [case(model, flags, each, f"{name}-{kind}-{each.name}", steps=STEPS) for each in [c.ONE, *which]]
    return made


NAMES = sorted(registry.rules())


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run([each for name in NAMES for each in _cases(name, LAYOUTS)])


@pytest.fixture(scope="module")
def slow_runs(pool: Pool) -> dict[str, Run]:
    return pool.run([each for name in NAMES for each in _cases(name, SLOW)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_repeats_one_process(runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    _compare(runs, name, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_repeats_one_process_slow(slow_runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    _compare(slow_runs, name, layout)


def _compare(runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    kind = "moe" if layout is c.EP2 else "dense"
    assert_same_curve(runs[f"{name}-{kind}-{layout.name}"], runs[f"{name}-{kind}-one"], steps=STEPS)
