"""What a loss costs in seconds: the time to the baseline's final loss on one machine, and token speedups turned into time.

A run reaches a loss where its validation curve does, by interpolation in log(tokens); seconds are those of training steps alone.
Speedups are compared by shared seeds, in logs: their spread over seeds, pooled over the table, gives the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from megatron_opt.study.curves import Curve
from megatron_opt.study.dataset import Best, Dataset
from megatron_opt.study.fits import intervals
from megatron_opt.study.fits.significance import LEVEL
from megatron_opt.study.fits.speedups import Speedup
from megatron_opt.study.fits.statement import Estimate, Statement
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record


@dataclass(frozen=True)
class ClusterTimes:
    """Seconds of an optimizer's step over the baseline's on a cluster, by the cost model."""

    name: str
    measured: Mapping[tuple[str, Regime], float]
    """at the study's own runs, in their own layout"""
    target: Mapping[str, float]
    """at the size that is extrapolated to"""
    notes: tuple[str, ...] = ()
    a_token: Mapping[tuple[str, Regime], float] = field(default_factory=dict)
    """GPU-seconds of a token at the study's own runs, the baseline's too"""


@dataclass(frozen=True)
class Reached:
    """An optimizer and the baseline until both are at the final loss of one of them in one regime; means over shared seeds."""

    optimizer: str
    regime: Regime
    target: float
    seeds: tuple[int, ...]
    tokens: float | None = None
    """None: never reached"""
    baseline_tokens: float | None = None
    seconds: float | None = None
    baseline_seconds: float | None = None
    in_tokens: Estimate | None = None
    """the baseline's tokens over those; the ends are NaN where no seed was repeated"""
    in_time: Estimate | None = None
    evaluations: int = 0
    """of the shortest curve"""
    why: str = ""
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TimeSpeedup:
    """A token speedup over the ratio of times a token, here and on a cluster."""

    optimizer: str
    n: float
    d: float
    tokens: Estimate
    ratio: Estimate | None = None
    """seconds a token over the baseline's, on the machine that ran them"""
    here: Estimate | None = None
    cluster_ratio: float | None = None
    there: Estimate | None = None


@dataclass
class WallClock:
    """Everything that is said of seconds."""

    reached: list[Reached] = field(default_factory=list)
    """until the baseline's final loss"""
    behind: list[Reached] = field(default_factory=list)
    """until the final loss of an optimizer that never reaches the baseline's"""
    speedups: list[TimeSpeedup] = field(default_factory=list)
    target: list[TimeSpeedup] = field(default_factory=list)
    cluster: ClusterTimes | None = None


def wall_clock(
    dataset: Dataset, speedups: list[Speedup], statement: Statement | None, cluster: ClusterTimes | None
) -> WallClock:
    """Times of a data set; what was not measured is left out."""
    ratios = step_ratios(dataset)
    once = [record for record in dataset.records if record.regime.epochs == 1]
    regimes = {(r.optimizer, float(r.parameters), float(r.tokens)): r.regime for r in once}
    times = times_reached(dataset, cluster)
    for one in speedups:
        key = one.optimizer, regimes[one.optimizer, one.n, one.d]
        tokens, ratio = Estimate(one.value, one.low, one.high), ratios.get(key)
        there = cluster.measured.get(key) if cluster else None
        if ratio is None and there is None:
            continue
        times.speedups.append(_in_time(one.optimizer, one.n, one.d, tokens, ratio, there))
    for said in statement.predictions if statement and cluster else ():
        assert cluster is not None
        if said.optimizer in cluster.target:
            there = cluster.target[said.optimizer]
            times.target.append(_in_time(said.optimizer, said.n, said.d, said.speedup, None, there))
    return times


def times_reached(dataset: Dataset, cluster: ClusterTimes | None = None) -> WallClock:
    """What needs no fit: times to final losses, as measured."""
    rows = reached(dataset)
    return WallClock(rows, behind(dataset, rows), cluster=cluster)


def _in_time(
    name: str, n: float, d: float, tokens: Estimate, ratio: Estimate | None, there: float | None
) -> TimeSpeedup:
    return TimeSpeedup(
        name,
        n,
        d,
        tokens,
        ratio,
        None if ratio is None else _quotient(tokens, ratio),
        there,
        None if there is None else tokens.over(there),
    )


def _quotient(tokens: Estimate, ratio: Estimate) -> Estimate:
    """Independent errors added in logs; an end at infinity or below zero stays what it is."""
    value = tokens.value / ratio.value
    if not math.isfinite(ratio.low):
        return Estimate(value, tokens.low / ratio.value, tokens.high / ratio.value)

    def end(of_tokens: float, of_ratio: float, side: int) -> float:
        if not (math.isfinite(of_tokens) and of_tokens > 0 and math.isfinite(value)):
            return of_tokens / ratio.value
        return value * math.exp(side * math.hypot(math.log(of_tokens / tokens.value), math.log(of_ratio / ratio.value)))

    return Estimate(value, end(tokens.low, ratio.high, -1), end(tokens.high, ratio.low, 1))


def step_ratios(dataset: Dataset) -> dict[tuple[str, Regime], Estimate]:
    """(optimizer, regime) → seconds a token over the baseline's, 90% interval; NaN ends where no seed was repeated."""
    logs: dict[tuple[str, Regime], list[float]] = {}
    by_id, best = {record.id: record for record in dataset.records}, dataset.best()
    for (name, regime), cell in best.items():
        base = best.get((dataset.baseline, regime))
        if name == dataset.baseline or base is None:
            continue
        pairs = [(_per_token(by_id[a]), _per_token(by_id[b])) for a, b, _ in _pairs(cell, base)]
        log_ratios = [math.log(a / b) for a, b in pairs if a and b]
        if log_ratios:
            logs[name, regime] = log_ratios
    return _estimates(logs, intervals.LEVEL)


def _pairs(cell: Best, base: Best) -> list[tuple[str, str, int]]:
    """Runs of both with one seed; where they share none, the two that were chosen."""
    mine, others = dict(zip(cell.seeds, cell.ids)), dict(zip(base.seeds, base.ids))
    shared = sorted(set(mine) & set(others))
    return [(mine[s], others[s], s) for s in shared] or [(cell.record.id, base.record.id, cell.record.seed)]


def _per_token(record: Record) -> float | None:
    """Seconds of training a token."""
    seconds, tokens = record.results.get("train_time_s"), record.results.get("tokens") or record.tokens
    return float(seconds) / float(tokens) if seconds and tokens else None


def _estimates[K](logs: Mapping[K, list[float]], level: float) -> dict[K, Estimate]:
    """Geometric means with t intervals, of a spread over seeds that is pooled over all entries."""
    squares = sum(float(np.var(one)) * len(one) for one in logs.values())
    freedom = sum(len(one) - 1 for one in logs.values())
    estimates = {}
    for key, one in logs.items():
        mean, reach = float(np.mean(one)), math.nan
        if freedom and len(one) > 1:
            reach = float(stats.t(freedom).isf((1 - level) / 2)) * math.sqrt(squares / freedom / len(one))
        estimates[key] = Estimate(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach))
    return estimates


def reached(dataset: Dataset) -> list[Reached]:
    """Every optimizer against the baseline's final loss, in every regime with curves and times."""
    drafts: list[tuple[Reached, list[_Met]]] = []
    for row, pairs in _paired(dataset):
        known = [way for mine, base in pairs if (way := _way(dataset, mine, base)) is not None]
        if not known:
            continue
        row = _towards(row, known)
        got = [way for way in known if way.tokens is not None and way.seconds is not None]
        if len(got) < len(known):
            above = float(np.mean([way.ends - way.target for way in known]))
            some = f"in {len(known) - len(got)} of {len(known)} seeds " if got else ""
            drafts.append((replace(row, why=f"not reached {some}(ends {above:+.4f} from it)"), []))
            continue
        met = [_Met(way.tokens or 1, way.whole_tokens, way.seconds or 1, way.whole_seconds) for way in got]
        drafts.append((row, met))
    return _filled(drafts)


def behind(dataset: Dataset, rows: list[Reached]) -> list[Reached]:
    """The baseline against the final loss of optimizers that never reach its own; `rows`: of `reached`."""
    late = {(row.optimizer, row.regime) for row in rows if row.why}
    drafts: list[tuple[Reached, list[_Met]]] = []
    for row, pairs in _paired(dataset):
        if (row.optimizer, row.regime) not in late:
            continue
        known = [way for mine, base in pairs if (way := _way(dataset, base, mine)) is not None]
        if all(way.tokens and way.seconds for way in known):
            met = [_Met(way.whole_tokens, way.tokens or 1, way.whole_seconds, way.seconds or 1) for way in known]
            drafts.append((_towards(row, known), met))
    return _filled(drafts)


def _paired(dataset: Dataset) -> Iterator[tuple[Reached, list[tuple[Record, Record]]]]:
    """Every optimizer but the baseline in every regime of both, and (its run, the baseline's) by seed."""
    by_id, best = {record.id: record for record in dataset.records}, dataset.best()
    for regime in dataset.regimes:
        base = best.get((dataset.baseline, regime))
        for name in dataset.optimizers[1:]:
            cell = best.get((name, regime))
            if base is None or cell is None:
                continue
            pairs = _pairs(cell, base)
            seeds, runs = tuple(seed for *_, seed in pairs), tuple(run for a, b, _ in pairs for run in (a, b))
            row = Reached(name, regime, math.nan, seeds, runs=runs)
            yield row, [(by_id[mine], by_id[other]) for mine, other, _ in pairs]


def _towards(row: Reached, ways: list[_Way]) -> Reached:
    target = float(np.mean([way.target for way in ways]))
    return replace(row, target=target, evaluations=min(way.evaluations for way in ways))


@dataclass(frozen=True)
class _Met:
    """What two runs have spent when both are at one loss."""

    tokens: float
    baseline_tokens: float
    seconds: float
    baseline_seconds: float


def _filled(drafts: list[tuple[Reached, list[_Met]]]) -> list[Reached]:
    """Means over seeds and speedups, whose spread over seeds is pooled over all rows."""
    got = {i: met for i, (_, met) in enumerate(drafts) if met}
    tokens = _estimates({i: [math.log(m.baseline_tokens / m.tokens) for m in met] for i, met in got.items()}, LEVEL)
    times = _estimates({i: [math.log(m.baseline_seconds / m.seconds) for m in met] for i, met in got.items()}, LEVEL)
    rows = [row for row, _ in drafts]
    for i, met in got.items():
        rows[i] = replace(
            rows[i],
            tokens=float(np.mean([m.tokens for m in met])),
            baseline_tokens=float(np.mean([m.baseline_tokens for m in met])),
            seconds=float(np.mean([m.seconds for m in met])),
            baseline_seconds=float(np.mean([m.baseline_seconds for m in met])),
            in_tokens=tokens[i],
            in_time=times[i],
        )
    return rows


@dataclass(frozen=True)
class _Way:
    """One run's way to the final loss of another, which spent `whole_tokens` and `whole_seconds` on it."""

    target: float
    ends: float
    whole_tokens: float
    whole_seconds: float
    tokens: float | None
    seconds: float | None
    evaluations: int


def _way(dataset: Dataset, mine: Record, other: Record) -> _Way | None:
    """None where curve or times are not known."""
    curve = dataset.curve(mine.id)
    mine_s, other_s = mine.results.get("train_time_s"), other.results.get("train_time_s")
    if curve is None or not mine_s or not other_s or other.loss is None or mine.loss is None:
        return None
    points = [(p["tokens"], p["loss"]) for p in curve.valid if p.get("tokens") and p.get("loss") is not None]
    if len(points) < 2:
        return None
    tokens = crossing(points, other.loss)
    seconds = None if tokens is None else float(mine_s) * share_of_time(curve, tokens, mine.tokens)
    return _Way(other.loss, mine.loss, other.tokens, float(other_s), tokens, seconds, len(points))


def crossing(points: list[tuple[float, float]], target: float) -> float | None:
    """Tokens at which a curve is at `target` for the first time, linear in log(tokens); None where it never is."""
    before: tuple[float, float] | None = None
    for tokens, loss in points:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(tokens)
            share = (before[1] - target) / (before[1] - loss)
            return math.exp(math.log(before[0]) + share * (math.log(tokens) - math.log(before[0])))
        before = (tokens, loss)
    return None


def share_of_time(curve: Curve, tokens: float, total: float) -> float:
    """Part of the run's training time that it had spent at `tokens`, by the logged times of its steps."""
    x, y, iteration = [0.0], [0.0], 0
    for point in curve.train:
        if point.get("step_time") is None or point.get("tokens") is None:
            return tokens / total
        x.append(float(point["tokens"]))
        y.append(y[-1] + point["step_time"] * (point["iteration"] - iteration))
        iteration = point["iteration"]
    return float(np.interp(tokens, x, y)) / y[-1] if y[-1] else tokens / total
