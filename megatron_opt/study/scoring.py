"""How well a registered prediction did: coverage, CRPS, and which hypothesis on the gain won."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opt.study.dataset import Dataset
from megatron_opt.study.spec import Regime

TELLS = math.log(10.0)
"""difference of log scores from which one hypothesis is said to have won: ten times as likely"""


@dataclass(frozen=True)
class Row:
    """One outcome beside its prediction."""

    optimizer: str
    regime: str
    what: str
    """loss or gain"""
    value: float
    low: float
    high: float
    """90% interval of the outcome of one run, as it was registered"""
    outcome: float
    crps: float
    runs: tuple[str, ...]

    @property
    def inside(self) -> bool:
        return self.low <= self.outcome <= self.high


@dataclass(frozen=True)
class Score:
    """All outcomes, and each hypothesis' log score and mean CRPS over the gains."""

    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    """optimizer and regime without an outcome, with the reason"""
    log_scores: dict[str, float]
    crps: dict[str, float]

    def coverage(self, what: str) -> tuple[int, int]:
        """Outcomes inside their 90% interval, and all."""
        mine = [row for row in self.rows if row.what == what]
        return sum(row.inside for row in mine), len(mine)

    def mean_crps(self, what: str) -> float:
        """Mean CRPS in nats; nan without outcomes."""
        mine = [row.crps for row in self.rows if row.what == what]
        return float(np.mean(mine)) if mine else math.nan

    def verdict(self, words: dict[str, str]) -> str:
        """Which hypothesis won, in words."""
        if not self.log_scores:
            return "No gain was measured, so no hypothesis can be judged."
        order = sorted(self.log_scores, key=lambda key: -self.log_scores[key])
        best = order[0]
        close = [key for key in order[1:] if self.log_scores[best] - self.log_scores[key] < TELLS]
        if close:
            rest = "; ".join(words[key] for key in close)
            return (
                f"Closest to the outcome: {words[best]}. Not told apart from it (less than 10 times as likely): {rest}."
            )
        ahead = self.log_scores[best] - self.log_scores[order[1]]
        times = f"{math.exp(ahead):.0f}" if ahead < 10 else f"e^{ahead:.0f}"
        return f"Won: {words[best]}; the outcome is {times} times as likely under it as under the next."


def score(content: dict[str, Any], dataset: Dataset) -> Score:
    """Score the predictions that have an outcome."""
    best, rows, missing = dataset.best(), [], []
    states = {(r.optimizer, str(r.regime)): r.status for r in dataset.records}
    log_scores: dict[str, float] = {}
    by_hypothesis: dict[str, list[float]] = {}
    for said in content["predictions"]:
        name, regime = said["optimizer"], Regime.parse(said["regime"])
        own, base = best.get((name, regime)), best.get((content["baseline"], regime))
        if own is None:
            missing.append(f"{name} {regime} ({states.get((name, str(regime)), 'not run')})")
            continue
        rows.append(_row(said, "loss", said["loss"], said["outcome_loss"], own.loss, (own.record.id,)))
        if "outcome_gain" not in said or base is None:
            continue
        gain = base.loss - own.loss
        runs = (base.record.id, own.record.id)
        rows.append(_row(said, "gain", said["gain"], said["outcome_gain"]["law"], gain, runs))
        for key, outcome in said["outcome_gain"].items():
            quantiles = np.array(outcome["quantiles"])
            log_scores[key] = log_scores.get(key, 0.0) + _log_density(quantiles, gain)
            by_hypothesis.setdefault(key, []).append(crps(quantiles, gain))
    means = {key: float(np.mean(values)) for key, values in by_hypothesis.items()}
    return Score(tuple(rows), tuple(missing), log_scores, means)


def _row(
    said: dict[str, Any],
    what: str,
    value: dict[str, float],
    outcome: dict[str, Any],
    seen: float,
    runs: tuple[str, ...],
) -> Row:
    error = crps(np.array(outcome["quantiles"]), seen)
    return Row(
        said["optimizer"], said["regime"], what, value["value"], outcome["low"], outcome["high"], seen, error, runs
    )


def crps(sample: np.ndarray, outcome: float) -> float:
    """E|X − y| − ½·E|X − X′| of a sample's distribution (Gneiting and Raftery, 2007); 0 is perfect, in the unit of y."""
    ordered, count = np.sort(sample), len(sample)
    spread = 2 * np.sum(ordered * (2 * np.arange(1, count + 1) - count - 1)) / count**2
    return float(np.mean(np.abs(ordered - outcome)) - 0.5 * spread)


def _log_density(sample: np.ndarray, outcome: float) -> float:
    """Log density of a Student t with four degrees of freedom at the sample's median and spread: one far miss is not all."""
    middle = float(np.median(sample))
    scale = max(float(np.subtract(*np.quantile(sample, [0.95, 0.05]))) / 2 / 2.132, 1e-9)
    z = (outcome - middle) / scale
    return math.log(0.375 / scale) - 2.5 * math.log1p(z * z / 4)
