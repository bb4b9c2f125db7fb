"""Where between the values of a grid the best value of a hyperparameter lies, and how surely."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_opt.study.dataset import Best, Dataset
from megatron_opt.study.store import Record

LEAST_ERROR = 0.1
"""of a grid step: a parabola through three points is no better than this"""


@dataclass(frozen=True)
class Optimum:
    """The best value of one hyperparameter in one regime, in log units."""

    n: float
    d: float
    log_value: float
    error: float
    """standard error of log_value: from the curve of losses, or the grid's step where there is none"""
    curvature: float | None
    """second derivative of the loss by log value; None without losses on both sides"""
    tuned: float
    """the value on the grid"""
    edge: bool
    """the best value is the last that was tried on a side"""


def optima(dataset: Dataset, optimizer: str, key: str, sigma: float) -> list[Optimum]:
    """The optimum of each regime of unique tokens in which `key` is a positive number; `sigma` is the noise of one loss."""
    best = [cell for (name, _), cell in dataset.best().items() if name == optimizer and _number(cell.record, key)]
    best = [cell for cell in best if cell.record.regime.epochs == 1]
    slices = [_tried(dataset, cell, key) for cell in best]
    steps = [math.log(b / a) for tried in slices for a, b in zip(sorted(tried), sorted(tried)[1:])]
    step = float(np.median(steps)) if steps else math.log(2)
    return [_optimum(cell.record, key, tried, step, sigma) for cell, tried in zip(best, slices)]


def _number(record: Record, key: str) -> bool:
    value = record.hyper.get(key)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _tried(dataset: Dataset, cell: Best, key: str) -> dict[float, float]:
    """Value → loss (inf where it diverged) of the runs that differ from the winner in this value alone, its seed's: what a seed
    does to all its losses would bend the curve where other seeds have some of its values.
    """
    winner = cell.record
    others = {name: value for name, value in winner.hyper.items() if name != key}
    losses = {float(winner.hyper[key]): math.inf if winner.loss is None else winner.loss}
    for record in dataset.finished:
        cell_of = (record.optimizer, record.regime, record.seed)
        if cell_of != (winner.optimizer, winner.regime, winner.seed) or not _number(record, key):
            continue
        if {name: value for name, value in record.hyper.items() if name != key} == others:
            value, loss = float(record.hyper[key]), math.inf if record.loss is None else record.loss
            losses[value] = min(losses.get(value, math.inf), loss)
    return losses


def _optimum(record: Record, key: str, tried: dict[float, float], step: float, sigma: float) -> Optimum:
    value = float(record.hyper[key])
    values = sorted(tried)
    i, at = values.index(value), math.log(value)
    size = (float(record.parameters), float(record.tokens))
    if len(values) == 1:
        # Nothing says on which side of the value the optimum lies.
        return Optimum(*size, at, step / math.sqrt(12), None, value, False)
    if i in (0, len(values) - 1):
        # One side is open: the optimum lies from half a step inside to a step or more outside.
        outward = 1 if i else -1
        return Optimum(*size, at + 0.25 * outward * step, 0.75 * step, None, value, True)
    t = np.log([values[i - 1], value, values[i + 1]])
    losses = np.array([tried[values[i - 1]], tried[value], tried[values[i + 1]]])
    uniform = (t[2] - t[0]) / 2 / math.sqrt(12)
    if not np.isfinite(losses).all():
        return Optimum(*size, at, uniform, None, value, False)
    vertex, curvature = _vertex(t, losses)
    moved = [_vertex(t, losses + sigma * unit)[0] - vertex for unit in np.eye(3)]
    error = math.hypot(float(np.linalg.norm(moved)), LEAST_ERROR * (t[2] - t[0]) / 2)
    return Optimum(*size, vertex, min(error, uniform), curvature, value, False)


def _vertex(t: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Vertex of the parabola through three points, within half a step of the middle one, and its curvature."""
    curvature, slope, _ = np.polyfit(t - t[1], losses, 2)
    if curvature <= 0:
        return float(t[1]), 0.0
    shift = float(np.clip(-slope / (2 * curvature), (t[0] - t[1]) / 2, (t[2] - t[1]) / 2))
    return float(t[1] + shift), float(2 * curvature)
