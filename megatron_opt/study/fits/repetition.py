"""What repeated tokens are worth: the data-constrained law of Muennighoff et al., arXiv 2305.16264.

R = E − 1 repetitions of U unique tokens are worth D' = U + U·R*·(1 − e^(−R/R*)) unique ones. R* is fitted for each optimizer against
its own law of unique tokens, L(N, D'); with R* → ∞ a repeated token is as good as a new one, with R* → 0 it is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Best, Dataset, Seeded
from megatron_opt.study.fits.ensemble import Ensemble
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.power_law import fit_power_law
from megatron_opt.study.fits.significance import Comparison, compare_pairs
from megatron_opt.study.fits.statement import Estimate
from megatron_opt.study.spec import Regime

GRID = np.geomspace(1e-2, 1e4, 241)
"""values of R* that are tried"""
COPIES = 200

Law = Callable[[np.ndarray], np.ndarray]
"""tokens (k,) → losses (copies, k) at one model size"""


@dataclass(frozen=True)
class RepeatedCell:
    """One optimizer in one regime of several epochs."""

    optimizer: str
    regime: Regime
    n: float
    tokens: float
    unique: float
    loss: float
    cost: Comparison | None
    """loss of as many unique tokens − this one's, negative where repeating costs; None where those were not run"""
    again: Comparison | None
    """loss of one epoch of the same unique tokens − this one's: what further epochs gain; None where that was not run"""
    effective: Estimate | None
    """unique tokens that give this loss, by the optimizer's own law"""
    runs: tuple[str, ...] = ()


@dataclass
class Repetition:
    """All of it; what could not be fitted is said in `notes`."""

    cells: list[RepeatedCell] = field(default_factory=list)
    r_star: dict[str, Estimate] = field(default_factory=dict)
    """optimizer → R* with a 90% interval, whose ends may be those of the grid"""
    notes: list[str] = field(default_factory=list)


def effective_tokens(unique: np.ndarray | float, epochs: np.ndarray | float, r_star: np.ndarray | float) -> np.ndarray:
    """D' = U + U·R*·(1 − e^(−R/R*)), R = epochs − 1 (arXiv 2305.16264)."""
    r_star = np.asarray(r_star, float)
    return np.asarray(unique, float) * (1 - r_star * np.expm1(-(np.asarray(epochs, float) - 1) / r_star))


def repetition(
    dataset: Dataset, data: Observations, sigma: float, ensemble: Ensemble | None = None, seed: int = 0
) -> Repetition:
    """Of all regimes of several epochs; `data` are the losses of unique tokens, `sigma` is the noise of one loss."""
    result, rng = Repetition(), np.random.default_rng(seed)
    cells = {key: cell for key, cell in dataset.best().items() if key[1].epochs > 1 and key[0] in data.optimizers}
    compared = _compared(dataset, cells)
    for name in data.optimizers:
        mine = {regime: cell for (other, regime), cell in cells.items() if other == name}
        sizes: dict[float, Law] = {}
        for n in sorted({float(cell.record.parameters) for cell in mine.values()}):
            try:
                sizes[n] = law_at(data, name, n, sigma, rng, ensemble)
            except UserError as error:
                result.notes.append(f"No worth of repeated tokens of {name} at {n:,.0f} parameters: {error}.")
        laws = {r: sizes[n] for r, cell in mine.items() if (n := float(cell.record.parameters)) in sizes}
        losses = {regime: _noisy(cell, sigma, rng) for regime, cell in mine.items()}
        result.cells += [_cell(name, regime, cell, compared, laws.get(regime), losses) for regime, cell in mine.items()]
        if laws:
            result.r_star[name] = fit_r_star(
                [(float(mine[r].record.unique_tokens), r.epochs, losses[r], law) for r, law in laws.items()]
            )
    return result


def law_at(
    data: Observations, name: str, n: float, sigma: float, rng: np.random.Generator, ensemble: Ensemble | None
) -> Law:
    """Copies of an optimizer's loss over unique tokens at one size: the hierarchical law, else its own L(D); raises UserError."""
    if ensemble is not None and name in ensemble.optimizers:
        law = ensemble
        draws = np.linspace(0, len(law.losses(name, n, 1e9)) - 1, COPIES).astype(int)
        return lambda d: law.losses(name, n, d)[draws]
    mine = data.of(name)
    mine = mine.where(mine.n == n)
    fits = [
        fit_power_law(mine.d, mine.loss + sigma * rng.standard_normal(len(mine)) / np.sqrt(mine.counts))
        for _ in range(COPIES)
    ]
    return lambda d: np.stack([fit.loss(d) for fit in fits])


def fit_r_star(cells: list[tuple[float, int, np.ndarray, Law]]) -> Estimate:
    """R* of least squares over cells (U, epochs, copies of the loss, law), copy by copy; median and 90% interval."""
    squares = np.zeros((COPIES, len(GRID)))
    for unique, epochs, losses, law in cells:
        squares += (law(effective_tokens(unique, epochs, GRID)) - losses[:, None]) ** 2
    copies = _lowest(squares)
    low, high = interval(copies)
    return Estimate(float(np.median(copies)), float(low), float(high))


def _lowest(squares: np.ndarray) -> np.ndarray:
    """R* (copies,) where squares (copies, grid) are least: the vertex of the parabola through the least and its neighbours."""
    least = np.argmin(squares, 1)
    inside = np.clip(least, 1, len(GRID) - 2)
    left, middle, right = (np.take_along_axis(squares, inside[:, None] + k, 1)[:, 0] for k in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, (left - right) / (2 * np.where(bend > 0, bend, 1.0)), 0.0)
    vertex = GRID[inside] * (GRID[1] / GRID[0]) ** np.clip(shift, -1, 1)
    return np.where(least == inside, vertex, GRID[least])


def _noisy(cell: Best, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return cell.loss + sigma / np.sqrt(len(cell.losses)) * rng.standard_normal(COPIES)


def _cell(
    name: str,
    regime: Regime,
    cell: Best,
    compared: dict[tuple[str, Regime, str], Comparison],
    law: Law | None,
    losses: dict[Regime, np.ndarray],
) -> RepeatedCell:
    record = cell.record
    effective = None
    if law is not None:
        grid = np.geomspace(record.unique_tokens / 4, record.tokens * 4, 400)
        curves = law(grid)  # (copies, 400), falling
        copies = np.array([np.interp(-loss, -curve, grid) for loss, curve in zip(losses[regime], curves)])
        low, high = interval(copies)
        effective = Estimate(float(np.median(copies)), float(low), float(high))
    return RepeatedCell(
        name,
        regime,
        float(record.parameters),
        float(record.tokens),
        float(record.unique_tokens),
        cell.loss,
        compared.get((name, regime, "cost")),
        compared.get((name, regime, "again")),
        effective,
        cell.ids,
    )


def _compared(dataset: Dataset, cells: dict[tuple[str, Regime], Best]) -> dict[tuple[str, Regime, str], Comparison]:
    """Each repeated regime against as many unique tokens (`cost`) and against one epoch of its own (`again`), as one table.

    For the comparison an optimizer's epochs count as optimizers of one regime, so that the noise is pooled over all.
    """
    best = dataset.best()
    table: dict[tuple[str, Regime], Seeded] = {}
    pairs: dict[tuple[str, Regime, str], tuple[str, str, Regime]] = {}
    for name, regime in cells:
        once = Regime(regime.model, regime.ratio)
        table[f"{name} {regime.epochs}", once] = best[name, regime]
        beside = {"cost": once, "again": Regime(regime.model, regime.ratio / regime.epochs)}
        for what, other in beside.items():
            key = f"{name} {what}" if what == "cost" else f"{name} {what} {regime.epochs}"
            if (name, other) in best:
                table[key, once] = best[name, other]
                pairs[name, regime, what] = f"{name} {regime.epochs}", key, once
    return dict(zip(pairs, compare_pairs(table, pairs.values(), dataset.looks, dataset.margin)))
