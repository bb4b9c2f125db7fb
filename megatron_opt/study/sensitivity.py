"""Which hyperparameters must be tuned again at every scale (arXiv 2509.02046, phase I to II)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_opt.study.spec import Regime

Tried = dict[Regime, list[tuple[dict[str, Any], float]]]
"""regime → (hyperparameters, loss) of everything one optimizer tried there"""


@dataclass(frozen=True)
class Sensitivity:
    """The verdict on one hyperparameter of one optimizer."""

    optimizer: str
    hyperparameter: str
    sensitive: bool
    value: Any
    """the value that does best over all regimes"""
    excess: float
    """its largest distance from a regime's optimum"""
    optima: dict[str, Any]
    """regime → the best value there"""


def best_of(tried: list[tuple[dict[str, Any], float]]) -> tuple[dict[str, Any], float]:
    """Lowest loss; (the first point, inf) when all diverged."""
    return min(tried, key=lambda item: item[1])


def classify(optimizer: str, grid: dict[str, tuple], tried: Tried, threshold: float) -> list[Sensitivity]:
    """A hyperparameter is insensitive when one value lies within `threshold` (Δ2) of the optimum in
    every regime.
    """
    found = []
    for key, values in grid.items():
        if len(values) < 2:
            continue
        excess: dict[Any, float] = {}
        for value in values:
            worst = 0.0
            for runs in tried.values():
                best, loss = best_of(runs)
                slice_ = [other for hyper, other in runs if hyper == best | {key: value}]
                worst = max(worst, min(slice_, default=math.inf) - loss if math.isfinite(loss) else math.inf)
            excess[value] = worst
        value = min(values, key=lambda v: excess[v])
        optima = {str(regime): best_of(runs)[0][key] for regime, runs in tried.items()}
        found.append(Sensitivity(optimizer, key, excess[value] > threshold, value, excess[value], optima))
    return found
