"""Repeated data: what reading the same tokens again costs and is worth, counted apart from unique tokens."""

from __future__ import annotations

import numpy as np

from megatron_opt.report.blocks import Plot, Section, Series, Table, colors
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.fits.repetition import GRID, effective_tokens
from megatron_opt.study.fits.significance import LEVEL, Comparison
from megatron_opt.study.fits.statement import Estimate
from megatron_opt.study.report.scaling import p_text


def repeated_data(analysis: Analysis) -> Section:
    """Empty without a regime of several epochs."""
    section, repeated = Section("Repeated data"), analysis.repetition
    if not repeated.cells:
        return section
    section.text = [
        "A regime `-2ep` reads half as many unique tokens twice, in another order; every other section counts its tokens, and no "
        "law of unique tokens is fitted to it. “Against unique” is the loss of as many unique tokens minus this one: below zero, "
        "repeating costs. “Against one epoch” is the loss of its own unique tokens read once, by a schedule of their own, minus "
        f"this one: what further epochs gain. {LEVEL:.0%} intervals over shared seeds; p after Holm's correction over both. "
        "Effective tokens are the unique ones that give this loss by the optimizer's own law (90%).",
    ]
    rows = [
        [
            str(one.regime),
            one.optimizer,
            f"{one.tokens:.3g}",
            f"{one.unique:.3g}",
            f"{one.loss:.4f}",
            *_compared(one.cost),
            *_compared(one.again),
            "–" if one.effective is None else _tokens(one.effective),
            ", ".join(one.runs),
        ]
        for one in repeated.cells
    ]
    header = ["regime", "optimizer", "tokens", "unique tokens", "valid loss", "against unique", "p (Holm)"]
    header += ["against one epoch", "p (Holm)", "effective tokens", "runs"]
    section.tables.append(Table(header, rows))
    if repeated.r_star:
        epochs = sorted({one.regime.epochs for one in repeated.cells})
        rows = [
            [name, _r_star(one), *(f"{float(effective_tokens(1.0, e, one.value)):.2f}" for e in epochs)]
            for name, one in repeated.r_star.items()
        ]
        header = ["optimizer", "R* (90% interval)", *(f"D'/U of {e} epochs" for e in epochs)]
        caption = "D' = U + U·R*·(1 − e^(−R/R*)), R = epochs − 1 (arXiv 2305.16264; 15 there for its Transformers)."
        section.tables.append(Table(header, rows, caption))
        section.plots.append(_plot(analysis))
    section.text += repeated.notes
    return section


def _compared(one: Comparison | None) -> tuple[str, str]:
    if one is None:
        return "–", "–"
    reach = "" if one.low is None else f" ({one.low:+.4f} to {one.high:+.4f})"
    return f"{one.gain:+.4f}{reach}", p_text(one.adjusted)


def _tokens(one: Estimate) -> str:
    return f"{one.value:.3g} ({one.low:.3g} to {one.high:.3g})"


def _r_star(one: Estimate) -> str:
    """Ends on the grid's are no numbers."""
    low, value, high = (
        "0" if x <= GRID[0] * 1.001 else "∞" if x >= GRID[-1] * 0.999 else f"{x:.3g}"
        for x in (one.low, one.value, one.high)
    )
    return f"{value} ({low} to {high})"


def _plot(analysis: Analysis) -> Plot:
    repeated, color = analysis.repetition, colors(analysis.dataset.optimizers)
    most = max(one.regime.epochs for one in repeated.cells)
    grid = np.linspace(1, most, 40)
    series = []
    for name, one in repeated.r_star.items():
        bands = [effective_tokens(1.0, grid, end).tolist() for end in (one.value, one.low, one.high)]
        series.append(Series(name, grid.tolist(), bands[0], color[name], points=False, low=bands[1], high=bands[2]))
        cells = [cell for cell in repeated.cells if cell.optimizer == name and cell.effective]
        y = [cell.effective.value / cell.unique for cell in cells if cell.effective]
        x = [float(cell.regime.epochs) for cell in cells]
        series.append(Series("", x, y, color[name], line=False, runs=[" ".join(cell.runs) for cell in cells]))
    return Plot("repeated-data", "What epochs are worth", "epochs", "effective over unique tokens", series)
