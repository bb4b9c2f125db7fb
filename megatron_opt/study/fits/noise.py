"""How far two losses must lie apart to mean something."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

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
    """Pooled over every configuration that ran with more than one seed: σ² = Σ(L − mean)² / Σ(n − 1).

    Where a configuration was chosen for its loss on a seed, that loss is no fair draw: it counts only where no other
    repetition does, and then makes σ larger, not smaller.
    """
    winners = {(name, regime, _key(cell.record.hyper)): cell for (name, regime), cell in dataset.best().items()}
    fair: dict[Hashable, list[float]] = {}
    every: dict[Hashable, list[float]] = {}
    for record in dataset.finished:
        if record.loss is None:
            continue
        key = (record.optimizer, record.regime, _key(record.hyper))
        every.setdefault(key, []).append(record.loss)
        cell = winners.get(key)
        if cell is None or record.id in cell.ids:
            fair.setdefault(key, []).append(record.loss)
    return _pooled(fair) or _pooled(every) or NoiseFloor(DEFAULT_FLOOR, 0)


def _key(hyper: dict[str, Any]) -> Hashable:
    return tuple(sorted(hyper.items(), key=str))


def _pooled(groups: dict[Hashable, list[float]]) -> NoiseFloor | None:
    squares = sum(float(np.var(losses)) * len(losses) for losses in groups.values() if len(losses) > 1)
    freedom = sum(len(losses) - 1 for losses in groups.values())
    return NoiseFloor(max(math.sqrt(squares / freedom), 1e-9), freedom) if freedom else None
