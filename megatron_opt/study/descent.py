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
SMALLEST = 1e-30
"""fp32 holds no smaller ε"""
MOST_WIDER = 8
"""values that one coordinate's grid is widened by"""


@dataclass(frozen=True)
class Sweep:
    """One hyperparameter swept over its grid with the rest fixed."""

    coordinate: str
    before: Any
    best: Any
    gain: float
    """loss before the sweep − lowest loss in it"""
    adopted: bool
    widened: int = 0
    """values tried beyond the grid, since the best lay on its edge"""


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
    grid: dict[str, tuple] = field(default_factory=dict)
    """the grid as it was widened"""

    def want(self, points: list[Point]) -> None:
        self.wanted += [point for point in points if point not in self.wanted]


def descend(start: Point, grid: dict[str, tuple], evaluate: Evaluate, adopt: float, most: int | None = None) -> Search:
    """Sweep one coordinate after the other until a pass moves none; move only for a gain above `adopt` (Δ1).

    Where the best value is the last on a side and better than its neighbour by more than Δ1, the grid is widened by its own
    step until it is not. `most`: the number of points after which no further sweep is begun.
    """
    search = Search(dict(start), grid=dict(grid))
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
            losses = _sweep(search, key, evaluate, adopt, most)
            if losses is None:
                return search
            best = min(losses, key=losses.__getitem__)
            gain = search.loss - losses[best] if losses[best] < search.loss else 0.0
            adopted = gain > adopt
            widened = len(search.grid[key]) - len(grid[key])
            search.sweeps.append(Sweep(key, search.point[key], best, gain, adopted, widened))
            if adopted:
                search.point, search.loss = search.point | {key: best}, losses[best]
                still = 1
            else:
                still += 1
    search.complete = True
    return search


def _sweep(search: Search, key: str, evaluate: Evaluate, adopt: float, most: int | None) -> dict[Any, float] | None:
    """Value → loss of one coordinate; None when something is not known yet, or the budget ends here."""
    losses: dict[Any, float] = {}
    values: list[Any] = list(search.grid[key])
    limit = len(values) + MOST_WIDER
    while values:
        points = [search.point | {key: value} for value in values]
        fresh = [point for point in points if point not in search.wanted]
        if most is not None and len(search.wanted) + len(fresh) > most:
            search.out_of_budget = True
            if losses:  # the grid itself was swept, only its widening is left out
                return losses
            search.complete = True
            return None
        search.want(points)
        seen = [evaluate(point) for point in points]
        for value, loss in zip(values, seen):
            if loss is not None:
                losses[value] = loss
        if len(losses) < len(search.grid[key]) or any(loss is None for loss in seen):
            return None
        known = losses if search.loss is None else losses | {search.point[key]: search.loss}
        value = wider(key, known, adopt) if len(search.grid[key]) < limit else None
        values = [] if value is None else [value]
        search.grid[key] = (*search.grid[key], *values)
    return losses


def wider(key: str, losses: dict[Any, float], adopt: float) -> Any | None:
    """The next value beyond the grid where its best lies on an edge, more than Δ1 below its neighbour; else None."""
    numbers = sorted(v for v in losses if isinstance(v, (int, float)) and not isinstance(v, bool))
    if len(numbers) < 2 or len(numbers) < len(losses):
        return None
    best = min(numbers, key=losses.__getitem__)
    if best not in (numbers[0], numbers[-1]) or not math.isfinite(losses[best]):
        return None
    neighbour = numbers[1] if best == numbers[0] else numbers[-2]
    return beyond(key, best, neighbour) if losses[neighbour] - losses[best] > adopt else None


def beyond(key: str, edge: float, neighbour: float) -> Any | None:
    """One step further out: geometric in the value, in 1 − value for momenta; None where the range ends."""
    if key == "batch_size" and edge < neighbour:
        return None  # a smaller batch may not fill the ranks
    whole = isinstance(edge, int) and isinstance(neighbour, int)
    if edge <= 0 or neighbour <= 0:
        return None if edge <= 0 else _rounded(2 * edge, edge, whole)
    if "beta" in key or "momentum" in key:
        value = 1 - (1 - edge) ** 2 / (1 - neighbour) if max(edge, neighbour) < 1 else 0.0
        return _rounded(value, edge, whole) if 0 < value < 1 else None
    value = edge * edge / neighbour
    if value < SMALLEST:
        return None
    if edge <= 1 and neighbour <= 1 and value > 1 and key != "lr":
        return None  # fractions end at one
    return _rounded(value, edge, whole) if value >= 1 or not whole else None


def _rounded(value: float, edge: float, whole: bool) -> Any | None:
    rounded: Any = round(value) if whole else float(f"{value:.4g}")
    return None if rounded == edge else rounded


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
    between = []
    if numbers[0] > 0:
        step_down = value / lower if lower else upper / value
        step_up = upper / value if upper else step_down
        between = [value / step_down**share, value * step_up**share]
        if numbers[-1] < 1 <= between[1]:
            # Momenta and decay fractions stay below one.
            between = between[:1]
    else:
        between = [value + share * (v - value) for v in (lower, upper) if v is not None]
    rounded = [round(v) if whole else float(f"{v:.4g}") for v in between]
    return [v for v in rounded if v != value]
