"""What the laws say about a scale nobody has run, and which run would say more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.scaling import Fit


@dataclass(frozen=True)
class Estimate:
    """A value with its 90% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Extrapolation:
    """One optimizer at one (N, D) by one fit."""

    kind: str
    optimizer: str
    n: float
    d: float
    loss: Estimate
    gain: Estimate
    """loss of the baseline − loss of the optimizer"""
    speedup: Estimate


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = interval(draws)
    return Estimate(float(value), float(low), float(high))


def extrapolate(fit: Fit, n: float, d: float) -> list[Extrapolation]:
    """Every optimizer of a fit at N parameters and D tokens."""
    baseline = fit.optimizers[0]
    base, base_draws = float(fit.predict(baseline, n, d)), fit.predict_draws(baseline, n, d)
    found = []
    for name in fit.optimizers:
        loss, draws = float(fit.predict(name, n, d)), fit.predict_draws(name, n, d)
        if name == baseline:
            gain, speedup = Estimate(0.0, 0.0, 0.0), Estimate(1.0, 1.0, 1.0)
        else:
            gain = _estimate(base - loss, base_draws - draws)
            speedup = _estimate(
                float(fit.speedup(name, n, d)),
                np.array([float(fit.speedup(name, n, d, t)) for t in fit.draws]),
            )
        found.append(Extrapolation(fit.kind, name, n, d, _estimate(loss, draws), gain, speedup))
    return found


@dataclass(frozen=True)
class Crossing:
    """Where an optimizer's gain over the baseline reaches zero along growing model size, at a fixed ratio."""

    kind: str
    optimizer: str
    ratio: float
    n: float
    """inf: not below `most`"""
    low: float
    high: float
    """90% interval of n"""
    share: float
    """share of the bootstrap copies that cross at all"""

    smallest: float
    """the smallest measured size: a crossing there means no gain to begin with"""

    def sentence(self) -> str:
        """The finding in words."""
        who = f"{self.optimizer}'s gain at {self.ratio:g}x, by the {self.kind} law,"
        if self.n <= self.smallest:
            what = "is not there even at the smallest size"
        elif np.isinf(self.n):
            what = "does not reach zero below 1e13 parameters"
        else:
            what = f"reaches zero at {self.n:.2g} parameters"
        low, high = ("beyond 1e13" if np.isinf(n) else f"{n:.2g}" for n in (self.low, self.high))
        return f"{who} {what} (90% interval {low} to {high}; {self.share:.0%} of the resamples cross)."


def crossing(fit: Fit, optimizer: str, ratio: float, tokens_per_parameter: float = 20.0) -> Crossing:
    """The first size beyond the smallest measured one at which the gain changes from positive to zero."""
    grid = np.geomspace(fit.data.sizes[0], 1e13, 200)
    baseline = fit.optimizers[0]

    def first(theta: np.ndarray) -> float:
        def gain(log_n: np.ndarray | float) -> np.ndarray:
            n = np.exp(log_n)
            d = ratio * tokens_per_parameter * n
            return fit.loss_at(theta, baseline, n, d) - fit.loss_at(theta, optimizer, n, d)

        values = gain(np.log(grid))
        if values[0] <= 0:
            return float(grid[0])
        below = np.flatnonzero(values <= 0)
        if not len(below):
            return np.inf
        i = below[0]
        return float(np.exp(brentq(lambda log_n: float(gain(log_n)), np.log(grid[i - 1]), np.log(grid[i]))))

    draws = np.array([first(theta) for theta in fit.draws])
    low, high = interval(draws)
    return Crossing(
        fit.kind,
        optimizer,
        ratio,
        first(fit.theta),
        float(low),
        float(high),
        float(np.mean(np.isfinite(draws))),
        float(grid[0]),
    )


@dataclass(frozen=True)
class NextRun:
    """A run that was not made, and how much it would narrow the interval of a target gain."""

    optimizer: str
    n: float
    ratio: float
    flops: float
    shrinkage: float
    """share of the interval's width that the run would take away"""


def next_runs(
    fit: Fit, optimizer: str, n: float, d: float, *, tokens_per_parameter: float = 20.0, reach: float = 4.0
) -> list[NextRun]:
    """Candidate runs by what they tell of the gain at (n, d), most first.

    Linear Gaussian design: with precision P and a new row j of variance σ², the variance gᵀP⁻¹g of the
    target falls
    by (gᵀP⁻¹j)² / (σ² + jᵀP⁻¹j). Candidates: every optimizer at the measured sizes and up to `reach` times
    beyond.
    """
    baseline = fit.optimizers[0]
    covariance = np.linalg.inv(fit.information())
    target = fit.gradient(baseline, n, d) - fit.gradient(optimizer, n, d)
    variance = float(target @ covariance @ target)
    sizes = np.unique(np.concatenate([fit.data.sizes, fit.data.sizes[-1] * np.array([2.0, reach])]))
    # two digits: sizes and budgets are whole numbers, so equal ratios differ a little
    ratios = np.unique([float(f"{ratio:.2g}") for ratio in fit.data.d / fit.data.n / tokens_per_parameter])
    found = []
    for name in (baseline, optimizer):
        for size in sizes:
            for ratio in np.append(ratios, 2 * ratios[-1]):
                tokens = ratio * tokens_per_parameter * size
                row = fit.gradient(name, size, tokens)
                fall = float(target @ covariance @ row) ** 2 / (fit.sigma**2 + float(row @ covariance @ row))
                found.append(
                    NextRun(
                        name,
                        float(size),
                        float(ratio),
                        6 * size * tokens,
                        1 - np.sqrt(max(0.0, 1 - fall / variance)),
                    )
                )
    return sorted(found, key=lambda run: -run.shrinkage)
