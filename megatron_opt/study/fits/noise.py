"""How far two losses must lie apart to mean something."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_opt.study.dataset import Dataset

DEFAULT_FLOOR = 2e-3
"""assumed without repeated seeds: changes of Adam's ε alone move final losses of arXiv 2509.02046 this far"""


@dataclass(frozen=True)
class NoiseFloor:
    """Standard deviation of a final loss over seeds."""

    sigma: float
    freedom: int
    """degrees of freedom of the estimate; 0 when it is only assumed"""

    @property
    def measured(self) -> bool:
        return self.freedom > 0

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Confidence interval of σ from the χ² distribution."""
        if not self.measured:
            return self.sigma, self.sigma
        tail = (1 - level) / 2
        high, low = stats.chi2.ppf([tail, 1 - tail], self.freedom)
        return self.sigma * math.sqrt(self.freedom / low), self.sigma * math.sqrt(self.freedom / high)


def noise_floor(dataset: Dataset) -> NoiseFloor:
    """Pooled over every configuration that ran with more than one seed: σ² = Σ(L − mean)² / Σ(n − 1)."""
    groups: dict[tuple, list[float]] = {}
    for record in dataset.finished:
        if record.loss is not None:
            key = (record.optimizer, record.regime, tuple(sorted(record.hyper.items(), key=str)))
            groups.setdefault(key, []).append(record.loss)
    squares = sum(float(np.var(losses)) * len(losses) for losses in groups.values())
    freedom = sum(len(losses) - 1 for losses in groups.values())
    if freedom == 0:
        return NoiseFloor(DEFAULT_FLOOR, 0)
    return NoiseFloor(max(math.sqrt(squares / freedom), 1e-9), freedom)


@dataclass(frozen=True)
class Comparison:
    """Whether A's mean loss is lower than B's."""

    gain: float
    """mean loss of B − mean loss of A"""
    low: float
    high: float
    """90% interval of the gain"""
    p: float
    """two-sided p-value of no difference"""
    seeds_needed: int | None
    """seeds of each for 80% power at the 5% level if the gain is real; None for a gain of zero"""
    assumed: bool
    """the noise is assumed, not measured"""

    @property
    def significant(self) -> bool:
        return self.p < 0.05


def compare(a: tuple[float, ...], b: tuple[float, ...], floor: NoiseFloor) -> Comparison:
    """t-test of two means with the pooled noise of the whole study (z-test where the noise is assumed)."""
    gain = float(np.mean(b) - np.mean(a))
    error = floor.sigma * math.sqrt(1 / len(a) + 1 / len(b))
    law = stats.t(floor.freedom) if floor.measured else stats.norm
    reach = float(law.ppf(0.95)) * error
    needed = None
    if gain:
        needed = max(1, math.ceil(2 * ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * floor.sigma / gain) ** 2))
    return Comparison(
        gain, gain - reach, gain + reach, 2 * float(law.sf(abs(gain) / error)), needed, not floor.measured
    )
