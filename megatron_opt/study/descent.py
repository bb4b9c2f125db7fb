"""Coordinate descent over a grid, as a pure function of the losses known so far.

Called again with more losses it goes further along the same path: there is no state to lose (arXiv
2509.02046, 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Point = dict[str, Any]
Evaluate = Callable[[Point], float | None]
"""loss of a point: inf when it diverged, None when it is not known yet"""


@dataclass(frozen=True)
class Sweep:
    """One hyperparameter swept over its grid with the rest fixed."""

    coordinate: str
    before: Any
    best: Any
    gain: float
    """loss before the sweep − lowest loss in it"""
    adopted: bool


@dataclass
class Search:
    """How far a search has come."""

    point: Point
    loss: float | None = None
    wanted: list[Point] = field(default_factory=list)
    """every point asked for so far, in order, each once"""
    sweeps: list[Sweep] = field(default_factory=list)
    complete: bool = False
    out_of_budget: bool = False

    def want(self, points: list[Point]) -> None:
        self.wanted += [point for point in points if point not in self.wanted]


def descend(start: Point, grid: dict[str, tuple], evaluate: Evaluate, adopt: float, most: int | None = None) -> Search:
    """Sweep one coordinate after the other until a pass moves none; move only for a gain above `adopt` (Δ1).

    `most`: the number of points after which no further sweep is begun.
    """
    search = Search(dict(start))
    search.want([start])
    search.loss = evaluate(start)
    if search.loss is None:
        return search
    swept = [key for key, values in grid.items() if len(values) > 1]
    still = 0
    while still < len(swept):
        for key in swept:
            if still == len(swept):
                break
            points = [search.point | {key: value} for value in grid[key]]
            fresh = [point for point in points if point not in search.wanted]
            if most is not None and len(search.wanted) + len(fresh) > most:
                search.complete = search.out_of_budget = True
                return search
            search.want(points)
            losses = [evaluate(point) for point in points]
            if any(loss is None for loss in losses):
                return search
            known = [math.inf if loss is None else loss for loss in losses]
            i = min(range(len(points)), key=known.__getitem__)
            gain = search.loss - known[i] if known[i] < search.loss else 0.0
            adopted = gain > adopt
            search.sweeps.append(Sweep(key, search.point[key], grid[key][i], gain, adopted))
            if adopted:
                search.point, search.loss = points[i], known[i]
                still = 1
            else:
                still += 1
    search.complete = True
    return search


def refine(search: Search, grid: dict[str, tuple], evaluate: Evaluate, total: int) -> Search:
    """Spend runs until `total` points were tried: halfway to the neighbours of the best, then halfway again.

    Gives an optimizer that converged early the same effort as the others; any lower loss is kept.
    """
    if search.loss is None:
        return search
    search.complete = False
    for depth in range(1, 8):
        candidates = [
            search.point | {key: value}
            for key, values in grid.items()
            for value in _between(search.point[key], values, depth)
        ]
        fresh = [point for point in candidates if point not in search.wanted][: total - len(search.wanted)]
        search.want(fresh)
        losses = [evaluate(point) for point in fresh]
        if any(loss is None for loss in losses):
            return search
        for point, loss in zip(fresh, losses):
            if loss is not None and loss < search.loss:
                search.point, search.loss = point, loss
        if len(search.wanted) >= total:
            break
    search.complete = True
    return search


def _between(value: Any, values: tuple, depth: int) -> list[Any]:
    """Values 2^−depth of a grid step below and above; geometric where all are positive."""
    numbers = sorted(v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool))
    if isinstance(value, (bool, str)) or len(numbers) < 2:
        return []
    lower = max((v for v in numbers if v < value), default=None)
    upper = min((v for v in numbers if v > value), default=None)
    share, whole = 0.5**depth, all(isinstance(v, int) for v in values)
    found = []
    if numbers[0] > 0:
        step_down = value / lower if lower else upper / value
        step_up = upper / value if upper else step_down
        found = [value / step_down**share, value * step_up**share]
        if numbers[-1] < 1 <= found[1]:
            # Momenta and decay fractions stay below one.
            found = found[:1]
    else:
        found = [value + share * (v - value) for v in (lower, upper) if v is not None]
    rounded = [round(v) if whole else float(f"{v:.4g}") for v in found]
    return [v for v in rounded if v != value]
