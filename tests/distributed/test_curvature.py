"""Sophia's curvature on real layouts: one process's losses everywhere, and z⊙(Hz) that finite differences confirm."""

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import Case, case
from tests.distributed.compare import assert_same_curve
from tests.distributed.pool import Pool, Run

DENSE = [*c.DENSE, "--num-layers", "2"]
# a step is clip(m/max(γh, ε)): ε is large enough that rounding noise in m is no sign
SOPHIA = "--optimizer sophia --sophia-curvature-every 3 --sophia-eps 1e-4".split()
HUTCHINSON = [*SOPHIA, "--sophia-curvature", "hutchinson"]
ACCUMULATED = c.Layout("accumulated", 1, ("--micro-batch-size=1",))
DP2_ACCUMULATED = c.Layout.of("dp2-accumulated", 2, more=("--micro-batch-size=1",))
GNB = [c.TP2, c.DP2_DIST, c.PP2, c.TP2_DP2, ACCUMULATED, DP2_ACCUMULATED]
EXACT = [c.DP2, c.DP2_DIST, ACCUMULATED]


def _cases() -> list[Case]:
    made = [case(DENSE, SOPHIA, layout, f"gnb-{layout.name}") for layout in [c.ONE, *GNB]]
    made += [case(DENSE, HUTCHINSON, layout, f"hutchinson-{layout.name}") for layout in [c.ONE, *EXACT]]
    made.append(case(DENSE, [*SOPHIA, "--sophia-curvature-every", "1000"], c.ONE, "none"))
    made.append(case(DENSE, HUTCHINSON, c.ONE, "differences", steps=4, hook="finite_differences"))
    made.append(case(DENSE, HUTCHINSON, c.TP2, "refused"))
    return made


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run(_cases())


@pytest.mark.parametrize("layout", GNB, ids=lambda layout: layout.name)
def test_sampled_labels_give_one_processs_losses(runs: dict[str, Run], layout: c.Layout) -> None:
    assert_same_curve(runs[f"gnb-{layout.name}"], runs["gnb-one"])


@pytest.mark.parametrize("layout", EXACT, ids=lambda layout: layout.name)
def test_hutchinson_gives_one_processs_losses(runs: dict[str, Run], layout: c.Layout) -> None:
    assert_same_curve(runs[f"hutchinson-{layout.name}"], runs["hutchinson-one"])


def test_curvature_changes_the_run(runs: dict[str, Run]) -> None:
    gnb, hutchinson, none = (runs[name].losses for name in ("gnb-one", "hutchinson-one", "none"))
    assert gnb[:3] == none[:3] == hutchinson[:3]  # the first estimate is made after step 3
    assert len({gnb[-1], hutchinson[-1], none[-1]}) == 3


def test_products_with_the_hessian_are_those_of_finite_differences(runs: dict[str, Run]) -> None:
    found = [rank["finite_differences"] for rank in runs["differences"].ranks]
    assert runs["differences"].error is None
    assert len(found[0]) > 10
    for name, (off, size) in found[0].items():
        assert size > 0 and off < 0.02, (name, off)


def test_tensor_parallel_hutchinson_is_refused(runs: dict[str, Run]) -> None:
    assert all(said and "--tensor-model-parallel-size 1" in said for said in runs["refused"].user_errors)
