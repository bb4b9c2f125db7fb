"""Speedups in time: what curves and times of known truth give, and what a cluster's step times make of token speedups."""

import math

import numpy as np
import pytest

from megatron_opt.study import cli
from megatron_opt.study.curves import Curve
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.speedups import Speedup
from megatron_opt.study.fits.statement import Estimate
from megatron_opt.study.fits.wall_clock import (
    ClusterTimes,
    _quotient,
    crossing,
    reached,
    share_of_time,
    step_ratios,
    times_reached,
    wall_clock,
)
from megatron_opt.study.report.wall_clock import tokens_and_time
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record

REGIME, TOKENS = Regime("m", 1.0), 1_000_000


def record(optimizer, seed, loss, seconds, regime=REGIME, **more):
    base = {"config": {}, "arguments": [], "parameters": 50_000, "attempts": 1, "interruptions": 0, "job": None}
    base |= {"started": None, "finished": None, "reason": None, "hyper": {"lr": 0.01}, "status": "completed"}
    results = {"train_time_s": seconds, "tokens": TOKENS}
    name = f"{optimizer}{regime.model}{seed}"
    return Record(
        id=name, optimizer=optimizer, regime=regime, seed=seed, tokens=TOKENS, loss=loss, results=results, **base | more
    )


def curve(final, slope=0.5, steps=10):
    """Loss falls by `slope` for a factor of e in tokens, and every step takes as long."""
    at = [TOKENS * (k + 1) // steps for k in range(steps)]
    valid = [{"tokens": t, "iteration": k + 1, "loss": final + slope * math.log(TOKENS / t)} for k, t in enumerate(at)]
    train = [{"tokens": t, "iteration": k + 1, "step_time": 1.0, "loss": 1.0} for k, t in enumerate(at)]
    return Curve(train, valid)


def study(gains, seconds=(100.0, 150.0), base=3.0):
    """AdamW and Muon; Muon ends `gains[seed]` below, with a step that takes seconds[1] / seconds[0] as long."""
    records = [record("adamw", s, base, seconds[0]) for s in range(len(gains))]
    records += [record("muon", s, base - gain, seconds[1]) for s, gain in enumerate(gains)]
    return Dataset("d", "adamw", records, lambda run: curve({r.id: r.loss for r in records}[run]))


def test_time_to_the_baselines_loss_is_that_of_the_curve():
    gains = (0.20, 0.22, 0.18)
    (one,) = reached(study(gains))
    logs = np.array(gains) / 0.5  # log(tokens) that each seed is ahead by
    assert one.in_tokens.value == pytest.approx(math.exp(logs.mean()), rel=1e-9)
    assert one.in_time.value == pytest.approx(math.exp(logs.mean()) / 1.5, rel=1e-9)
    from scipy import stats

    reach = stats.t(2).isf(0.025) * logs.std(ddof=1) / math.sqrt(3)
    assert one.in_tokens.low == pytest.approx(math.exp(logs.mean() - reach), rel=1e-9)
    assert one.in_time.high == pytest.approx(math.exp(logs.mean() + reach) / 1.5, rel=1e-9)
    assert one.seconds == pytest.approx(np.mean(150 * np.exp(-logs)), rel=1e-9) and one.seeds == (0, 1, 2)


def test_what_is_not_reached_or_not_repeated_is_said_and_no_interval_is_made_up():
    (worse,) = reached(study((-0.1, -0.1)))
    assert worse.tokens is None and "not reached" in worse.why and "+0.1000" in worse.why
    (half,) = reached(study((0.1, -0.1)))
    assert half.in_time is None and "in 1 of 2 seeds" in half.why
    (alone,) = reached(study((0.1,)))
    assert math.isnan(alone.in_time.low) and alone.in_time.value == pytest.approx(math.exp(0.2) / 1.5)
    rows = tokens_and_time(study((0.1,)), times_reached(study((0.1,)))).tables[0].rows
    assert "to" not in rows[0][6].split() and rows[0][7] == f"{math.exp(0.2) / 1.5:.3f}"
    bare = Dataset("d", "adamw", [record("adamw", 1, 3.0, None), record("muon", 1, 2.9, None)])
    assert reached(bare) == [] and not tokens_and_time(bare, times_reached(bare)).tables


def test_of_one_that_ends_above_the_baselines_time_to_its_own_final_loss_is_told():
    gains = (-0.20, -0.22, -0.18)
    (one,) = times_reached(study(gains)).behind
    logs = np.array(gains) / 0.5
    assert one.in_tokens.value == pytest.approx(math.exp(logs.mean()), rel=1e-9) and one.target == pytest.approx(3.2)
    assert one.in_time.value == pytest.approx(math.exp(logs.mean()) / 1.5, rel=1e-9)
    assert one.baseline_seconds == pytest.approx(np.mean(100 * np.exp(logs)), rel=1e-9) and one.seconds == 150
    assert times_reached(study((0.1, -0.1))).behind == times_reached(study((0.1, 0.1))).behind == []


@pytest.mark.parametrize("gain", [0.2, -0.2])
def test_the_time_to_a_target_loss_is_predicted_for_a_cluster_where_no_law_can_be_fitted(gain):
    data = study((gain, gain, gain))
    there = ClusterTimes(
        "c", {("muon", REGIME): 1.1}, {"muon": 1.05}, a_token={("adamw", REGIME): 1e-5, ("muon", REGIME): 1.1e-5}
    )
    section = tokens_and_time(data, times_reached(data, there))
    (row,) = section.tables[-1].rows
    cells = dict(zip(section.tables[-1].header, row))
    tokens = TOKENS * math.exp(-abs(gain) / 0.5)
    assert float(cells["GPU-seconds to it, c"]) == pytest.approx(tokens * (1.1e-5 if gain > 0 else 1e-5), rel=5e-3)
    assert cells["speedup in time, c"].startswith(f"{math.exp(gain / 0.5) / 1.1:.3f} (")
    assert any("on c a step takes, over adamw's: muon 1.050" in text for text in section.text)


def test_a_curve_that_touches_its_target_twice_counts_from_the_first():
    points = [(100, 3.0), (200, 2.0), (400, 2.5), (800, 1.0)]
    assert crossing(points, 2.0) == pytest.approx(200) and crossing(points, 2.5) == pytest.approx(math.sqrt(100 * 200))
    assert crossing(points, 0.5) is None and crossing(points, 5.0) == 100


def test_steps_that_grow_longer_take_their_share():
    train = [{"tokens": 100, "iteration": 10, "step_time": 1.0}, {"tokens": 200, "iteration": 20, "step_time": 3.0}]
    assert share_of_time(Curve(train, []), 100, 200) == pytest.approx(0.25)
    assert (
        share_of_time(Curve([{"tokens": 100, "iteration": 1}], []), 50, 200) == 0.25
    )  # times are not known: by tokens


def test_token_speedups_become_times_here_and_there():
    data = study((0.2, 0.2, 0.2))
    (ratio,) = step_ratios(data).values()
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    times = ClusterTimes("c", {("muon", REGIME): 1.1}, {"muon": 1.05})
    found = wall_clock(data, [Speedup("muon", 50_000, TOKENS, 1.8, 1.5, math.inf, "size")], None, times)
    (one,) = found.speedups
    assert (one.here.value, one.here.low, one.here.high) == pytest.approx((1.2, 1.0, math.inf))
    assert (one.there.value, one.there.low) == pytest.approx((1.8 / 1.1, 1.5 / 1.1)) and math.isinf(one.there.high)
    both = _quotient(Estimate(1.0, math.exp(-0.3), math.exp(0.3)), Estimate(1.0, math.exp(-0.4), math.exp(0.4)))
    assert (both.low, both.high) == pytest.approx((math.exp(-0.5), math.exp(0.5)))


def test_intervals_hold_the_truth():
    """Times of noisy machines: 95% intervals of the time speedup hold it in 90 to 99% of the draws."""
    rng, held, draws = np.random.default_rng(1), 0, 200
    for _ in range(draws):
        records = []
        for k in range(3):
            regime = Regime(f"m{k}", 1.0)
            for seed in range(3):
                noise = rng.normal(0, 0.05, 2)
                records.append(record("adamw", seed, 3.0, 100 * math.exp(noise[0]), regime))
                records.append(record("muon", seed, 2.9, 130 * math.exp(noise[1]), regime))
        losses = {r.id: r.loss for r in records}
        rows = reached(Dataset("d", "adamw", records, lambda run, losses=losses: curve(losses[run])))
        held += sum(row.in_time.low <= math.exp(0.2) / 1.3 <= row.in_time.high for row in rows)
    assert 0.90 <= held / draws / 3 <= 0.99


def test_ratios_on_a_cluster_are_the_cost_models_in_each_runs_own_layout(make_study):
    from megatron_opt.study.commands.pricing import Prices
    from megatron_opt.study.runs import make_run
    from megatron_opt.study.study_file import read_study
    from tests.study.conftest import STUDY

    study, regime = read_study(make_study(STUDY)), Regime("tiny", 1.0)
    runs = [make_run(study, name, regime, {"lr": 0.008, "batch_size": 4}, 1) for name in ("adamw", "muon")]
    records = [
        record(run.optimizer, 1, 3.0, 1.0, regime, arguments=run.arguments, config=run.config, parameters=100)
        for run in runs
    ]
    own = record("mine", 1, 3.0, 1.0, regime, arguments=["--no-such-flag", "1"], config={})
    prices = Prices("h100")
    found = prices.beside(Dataset("d", "adamw", [*records, own]), 7e9)
    base, muon = (prices.step(study, run) for run in runs)
    assert found.a_token["muon", regime] == pytest.approx(1 / muon.tokens_per_second)
    assert found.measured == {("muon", regime): pytest.approx(base.tokens_per_second / muon.tokens_per_second)}
    assert 1.0 < found.target["muon"] < 1.2 and found.target.keys() == {"muon"}
    assert len(found.notes) == 1 and "No time of mine" in found.notes[0] and "missing" in found.notes[0]


def test_a_cluster_that_is_none_is_refused_with_its_line(make_study, capsys, monkeypatch):
    from megatron_opt.errors import UserError
    from tests.study.conftest import STUDY

    path = make_study(STUDY + "target: {parameters: 1000000, cluster: h10}\n")
    with pytest.raises(UserError, match=r"study.yaml:18: `cluster: h10`"):
        cli.main(["plan", str(path)], "study")
