"""The one prediction that commands, report and migration plans quote, and what it says in plain words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.study.fits.ensemble import Ensemble
from megatron_opt.study.fits.intervals import interval

FARTHEST = 1e13
"""parameters up to which a zero of the gain is looked for"""
SURE = 0.95
"""probability from which a sign is called settled"""


@dataclass(frozen=True)
class Estimate:
    """A value with its 90% interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int, unit: str = "") -> str:
        """Value and interval; ∞ where the baseline never gets there."""
        value, low, high = ("∞" if np.isinf(v) else f"{v:.{digits}f}" for v in (self.value, self.low, self.high))
        return f"{value}{unit} ({low} to {high})"

    def over(self, divisor: float) -> Estimate:
        """Value and interval over a number that is exact."""
        return Estimate(self.value / divisor, self.low / divisor, self.high / divisor)


@dataclass(frozen=True)
class Prediction:
    """One optimizer at one (N, D)."""

    optimizer: str
    n: float
    d: float
    loss: Estimate
    gain: Estimate
    """loss of the baseline − loss of the optimizer"""
    speedup: Estimate
    """tokens the baseline needs for the same loss, over D"""
    chance: float
    """P(gain > 0)"""
    reach: float
    """N over the largest measured size"""


@dataclass(frozen=True)
class Crossing:
    """Where an optimizer's gain reaches zero along growing model size at a fixed D/N, by the same copies."""

    optimizer: str
    ratio: float
    n: float
    """median of the size of zero gain; inf: most copies have none below 1e13"""
    low: float
    high: float
    """90% interval of n"""
    ever: float
    """P(gain reaches zero below 1e13 parameters)"""
    before_target: float
    """P(gain is zero or less at the target's size)"""
    decay: Estimate
    """p in gain ∝ N^−p between the smallest and the largest measured size"""
    smallest: float
    """the smallest measured size: a zero there means no gain to begin with"""

    def sentence(self, baseline: str) -> str:
        """The finding in words."""
        who = f"{self.optimizer}'s gain over {baseline} at {self.ratio:g}x"
        if self.n <= self.smallest or np.isnan(self.decay.value):
            return f"{who} is not there even at the smallest size (P(gain > 0 at the target) {_percent(1 - self.before_target)})."
        falls = f"{who} falls with size as N^−{self.decay.value:.2f} ({self.decay.low:.2f} to {self.decay.high:.2f})"
        if self.decay.value < 0:
            falls = (
                f"{who} grows with size as N^{-self.decay.value:.2f} ({-self.decay.high:.2f} to {-self.decay.low:.2f})"
            )
        low, high = (f"beyond {FARTHEST:.0e}" if np.isinf(n) else f"{n:.2g}" for n in (self.low, self.high))
        if np.isinf(self.n):
            zero = f"it reaches zero below {FARTHEST:.0e} parameters with probability {self.ever:.0%}"
        else:
            zero = f"it reaches zero at {self.n:.2g} parameters (90% interval {low} to {high}; probability {self.ever:.0%})"
        return f"{falls} between the measured sizes; {zero}."


@dataclass(frozen=True)
class Statement:
    """Everything said about a target size, from one ensemble."""

    baseline: str
    n: float
    ratios: tuple[float, ...]
    per_parameter: float
    reach: float
    largest: float
    predictions: tuple[Prediction, ...]
    crossings: tuple[Crossing, ...]
    calibration: tuple[str, ...]
    forms: dict[str, float]
    """form of law → weight"""

    def at(self, optimizer: str, ratio: float) -> Prediction:
        """The prediction of an optimizer at a ratio; raises KeyError."""
        for one in self.predictions:
            if one.optimizer == optimizer and np.isclose(one.d, ratio * self.per_parameter * self.n):
                return one
        raise KeyError((optimizer, ratio))

    def sentences(self) -> list[str]:
        """What the data can and cannot say at the target, at its first ratio: one sentence an optimizer, best first."""
        ratio = self.ratios[0]
        mine = [p for p in self.predictions if p.optimizer != self.baseline and np.isclose(p.d, ratio * self._unit)]
        sentences = [_words(p, self.baseline, ratio) for p in sorted(mine, key=lambda p: -p.gain.value)]
        return [self._ground(), *sentences]

    @property
    def _unit(self) -> float:
        return self.per_parameter * self.n

    def _ground(self) -> str:
        where = f"At {_size(self.n)} parameters"
        if self.reach <= 1.0:
            return f"{where}, inside the range of sizes that were run:"
        return (
            f"{where} nothing was run: the largest model had {_size(self.largest)}, {self.reach:.1f} times fewer. What follows "
            "is an extrapolation; it holds if gains go on changing with size in one of the ways that the forms of law "
            "describe, and no data here can check that."
        )


def _words(p: Prediction, baseline: str, ratio: float) -> str:
    if p.chance >= SURE:
        verdict = f"{p.optimizer} is expected to end below {baseline}"
    elif p.chance <= 1 - SURE:
        verdict = f"{p.optimizer} is expected to end above {baseline}"
    else:
        verdict = f"the data cannot tell whether {p.optimizer} ends below {baseline}"
    return (
        f"At {ratio:g}x tokens {verdict}: P(gain > 0) {_percent(p.chance)}; gain {p.gain.text(4)}, token speedup "
        f"{p.speedup.text(2)} (90% intervals)."
    )


def _percent(chance: float) -> str:
    """Copies are a few hundred: no probability is said to be closer to 0 or 1 than they resolve."""
    return "over 99%" if chance > 0.99 else "under 1%" if chance < 0.01 else f"{chance:.0%}"


def _size(n: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:.3g}"


def estimate(copies: np.ndarray) -> Estimate:
    """Median and 90% interval of copies."""
    low, high = interval(copies)
    return Estimate(float(np.median(copies)), float(low), float(high))


def predict(ensemble: Ensemble, optimizer: str, n: float, d: float) -> Prediction:
    """One optimizer at N parameters and D tokens."""
    gains, base = ensemble.gains(optimizer, n, d), optimizer == ensemble.optimizers[0]
    return Prediction(
        optimizer,
        n,
        d,
        estimate(ensemble.losses(optimizer, n, d)),
        Estimate(0.0, 0.0, 0.0) if base else estimate(gains),
        Estimate(1.0, 1.0, 1.0) if base else estimate(ensemble.speedups(optimizer, n, d)),
        0.5 if base else float(np.mean(gains > 0)),
        float(ensemble.reach(n)),
    )


def crossing(ensemble: Ensemble, optimizer: str, ratio: float, n: float, per_parameter: float) -> Crossing:
    """The first size from the smallest measured one on at which each copy's gain is zero or less."""
    sizes = ensemble.data.sizes
    grid = np.unique(np.concatenate([sizes[[0, -1]], np.geomspace(sizes[0], FARTHEST, 80)]))
    gains = ensemble.gains(optimizer, grid, ratio * per_parameter * grid)
    below = gains <= 0
    first = below.argmax(1)
    rows = np.arange(len(gains))
    before = np.maximum(first - 1, 0)
    high, low = gains[rows, before], gains[rows, first]
    share = np.where(first > 0, high / np.maximum(high - low, 1e-300), 0.0)
    logs = np.log(grid)
    crossed = np.exp(logs[before] + share * (logs[first] - logs[before]))
    crossed = np.where(below.any(1), crossed, np.inf)
    ends = gains[:, [0, int(np.searchsorted(grid, sizes[-1]))]]
    positive = ends[(ends > 0).all(1)]
    rate = np.log(positive[:, 0] / positive[:, 1]) / np.log(sizes[-1] / sizes[0])
    decay = estimate(rate) if len(rate) > 20 else Estimate(np.nan, np.nan, np.nan)
    low_n, high_n = interval(crossed)
    return Crossing(
        optimizer,
        ratio,
        float(np.quantile(crossed, 0.5, method="inverted_cdf")),
        float(low_n),
        float(high_n),
        float(below.any(1).mean()),
        float(np.mean(ensemble.gains(optimizer, n, ratio * per_parameter * n) <= 0)),
        decay,
        float(sizes[0]),
    )


def state(ensemble: Ensemble, n: float, ratios: tuple[float, ...], per_parameter: float = 20.0) -> Statement:
    """The statement on a target size at some ratios of tokens to `per_parameter` tokens a parameter."""
    predictions = [
        predict(ensemble, name, n, ratio * per_parameter * n) for ratio in ratios for name in ensemble.optimizers
    ]
    crossings = [
        crossing(ensemble, name, ratio, n, per_parameter) for ratio in ratios for name in ensemble.optimizers[1:]
    ]
    return Statement(
        ensemble.optimizers[0],
        n,
        tuple(ratios),
        per_parameter,
        float(ensemble.reach(n)),
        float(ensemble.data.n.max()),
        tuple(predictions),
        tuple(crossings),
        tuple(ensemble.calibration.sentences()),
        ensemble.weights,
    )
