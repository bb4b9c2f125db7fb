"""Published figures, our prediction and the ratio: within 25% for FLOP shares and state, 1.5× for times."""

import pytest

from megatron_opt.cost_model.published_runs import Run, published_runs, spread, table
from megatron_opt.cost_model.report import published_spread
from tests.cost_model.published import NOT_COMPARABLE, Figure, figures


def test_published_figures_are_met_or_explained() -> None:
    found = figures()
    print()
    for figure in found:
        mark = ("" if figure.holds else "  MISS") + (f"  ({figure.expected:.2f}: {figure.why})" if figure.why else "")
        print(
            f"{figure.source:<44} {figure.what:<88} {figure.published:>9.3f} {figure.predicted:>9.3f} "
            f"{figure.ratio:>6.2f}{mark}"
        )
    for name, why in NOT_COMPARABLE.items():
        print(f"not comparable: {name}: {why}")
    assert not [figure.what for figure in found if not figure.holds]
    assert all(figure.why for figure in found if figure.expected != 1)


def test_a_figure_outside_its_tolerance_does_not_hold() -> None:
    assert not Figure("", "", 1.0, 1.6, 1.5).holds
    assert not Figure("", "", 1.0, 0.6, 1.5).holds
    assert Figure("", "", 1.0, 0.7, 1.5).holds
    assert not Figure("", "", 1.0, 1.0, 1.5, "half is expected", 0.5).holds


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    found = published_runs()
    print(table(found))
    return found


def test_step_times_of_published_runs_are_met_in_the_middle_and_their_spread_is_said(runs: list[Run]) -> None:
    """Dense runs of 8B to 1T: half are slower than predicted and half faster; what outputs say is what is worked out."""
    low, middle, high, count = spread(run for run in runs if not run.moe and not run.held_out)
    assert count >= 14 and 0.95 <= middle <= 1.05
    low, _, high, _ = spread(run for run in runs if not run.moe)
    assert published_spread()["dense"] == pytest.approx((low, high), abs=0.01)
    low, _, high, _ = spread(run for run in runs if run.moe)
    assert published_spread()["moe"] == pytest.approx((low, high), abs=0.01)
    assert all(run.source for run in runs)


def test_fp8_runs_that_no_rate_was_fitted_to(runs: list[Run]) -> None:
    """NVIDIA's dense ones lie between 0.85 and 1.22 times the prediction, half above 1.02; with experts up to 3.

    torchtitan's, at 500 W and with casts of another library, take 1.25 to 1.55 times as long, as their bf16 runs do.
    """
    held = [run for run in runs if run.held_out and run.recipe]
    nvidia = [run for run in held if not run.moe and "NVIDIA" in run.source]
    low, middle, high, count = spread(nvidia)
    assert count >= 18 and low > 0.85 and 0.97 <= middle <= 1.06 and high < 1.22
    assert {run.cluster for run in nvidia} == {"h100", "b200", "gb200", "gb300"}
    low, middle, high, count = spread(run for run in held if run.moe)
    assert count >= 6 and low > 0.9 and middle < 1.25 and high < 3.0
    low, _, high, count = spread(run for run in held if "torchtitan" in run.source)
    assert count == 3 and low > 1.25 and high < 1.55


def test_what_fp8_gains_over_bf16(runs: list[Run]) -> None:
    """The same run in both, published side by side: 1.28 and 1.29 times the speed are met, 1.13 with experts is predicted 1.25."""
    pairs = [
        (slow, fast)
        for slow in runs
        for fast in runs
        if not slow.recipe and fast.recipe and fast.name == f"{slow.name}, {fast.recipe}"
        and (slow.source, slow.assumed) == (fast.source, fast.assumed)
    ]  # fmt: skip
    assert len(pairs) == 3
    for slow, fast in pairs:
        over = (slow.predicted / fast.predicted) / (slow.seconds / fast.seconds)
        print(
            f"{fast.name}: {slow.seconds / fast.seconds:.2f} measured, {slow.predicted / fast.predicted:.2f} predicted"
        )
        assert 1.0 < over < 1.15 if fast.moe else 0.98 < over < 1.02
