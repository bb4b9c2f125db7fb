"""Which hyperparameters must be tuned again at every scale (arXiv 2509.02046, phase I to II)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_opt.study.descent import wider
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
    excess: float | None
    """its largest distance from a regime's optimum; inf where it diverged, None where no value was tried in every regime"""
    optima: dict[str, Any]
    """regime → the best value there"""
    edges: tuple[str, ...] = ()
    """regimes whose best value is the last that was tried, with the loss still falling: the optimum lies beyond"""


def best_of(tried: list[tuple[dict[str, Any], float]]) -> tuple[dict[str, Any], float]:
    """Lowest loss; (the first point, inf) when all diverged."""
    return min(tried, key=lambda item: item[1])


def classify(optimizer: str, grid: dict[str, tuple], tried: Tried, threshold: float) -> list[Sensitivity]:
    """A hyperparameter is insensitive when one value lies within `threshold` (Δ2) of the optimum in every regime.

    It is sensitive too where an optimum lies on an edge with the loss still falling, and where no value was tried in all
    regimes: nothing there says that one value will do.
    """
    sensitivities = []
    for key, values in grid.items():
        if len(values) < 2:
            continue
        slices = {regime: _slice(runs, key) for regime, runs in tried.items()}
        slices = {regime: one for regime, one in slices.items() if one}
        common = set.intersection(*(set(one) for one in slices.values())) if slices else set()
        excess = {value: max(_excess(one, value) for one in slices.values()) for value in common}
        optima = {str(regime): best_of(runs)[0][key] for regime, runs in tried.items()}
        edges = tuple(str(regime) for regime, one in slices.items() if wider(key, one, threshold) is not None)
        if excess:
            value = min(sorted(excess, key=str), key=excess.__getitem__)
            sensitive = excess[value] > threshold or bool(edges)
            sensitivities.append(Sensitivity(optimizer, key, sensitive, value, excess[value], optima, edges))
        else:
            value = next(iter(optima.values()), values[0])
            sensitivities.append(Sensitivity(optimizer, key, True, value, None, optima, edges))
    return sensitivities


def _excess(losses: dict[Any, float], value: Any) -> float:
    best = min(losses.values())
    return losses[value] - best if math.isfinite(best) else math.inf


def _slice(runs: list[tuple[dict[str, Any], float]], key: str) -> dict[Any, float]:
    """Value → loss along one coordinate, all else alike: through the best point, or the best one that has neighbours."""
    groups: dict[str, dict[Any, float]] = {}
    for hyper, loss in runs:
        if key in hyper:
            rest = json.dumps({name: value for name, value in hyper.items() if name != key}, sort_keys=True)
            groups.setdefault(rest, {})[hyper[key]] = loss
    several = [one for one in groups.values() if len(one) > 1]
    return min(several, key=lambda one: min(one.values()), default={})
