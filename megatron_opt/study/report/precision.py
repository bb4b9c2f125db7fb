"""Precision: losses, gains and best rates with and without FP8 and their figures, and how steady runs were."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from megatron_opt.report.blocks import Plot, Section, Series, Table, colors
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.precision import (
    best_rates,
    changes,
    costs,
    gains,
    interval_of,
    pairs,
    precision_of,
    shifts,
)
from megatron_opt.study.fits.significance import LEVEL, Comparison
from megatron_opt.study.report.precision_ranges import fp8_ranges
from megatron_opt.study.spec import Regime

Interval = tuple[float, float, float]
"""a value with its lower and upper end, which are the value itself where there is no interval"""
SPREAD = 0.5
"""of a category's width, over which its optimizers stand beside one another"""


def precision(dataset: Dataset) -> list[Section]:
    """Empty where no model has a counterpart without FP8."""
    if not pairs(dataset):
        return []
    names = precision_names(dataset)
    return [_losses(dataset, names), _rates(dataset, names), fp8_ranges(dataset, names), _steadiness(dataset, names)]


def precision_names(dataset: Dataset) -> dict[Regime, str]:
    """Each regime as its precision, the ones without FP8 first; the regime itself where a precision has several."""
    listed = list(dict.fromkeys([pair.plain for pair in pairs(dataset)] + [pair.regime for pair in pairs(dataset)]))
    of = {record.regime: precision_of(record) for record in dataset.records}
    several = {name for name in of.values() if sum(of[regime] == name for regime in listed) > 1}
    return {regime: str(regime) if of[regime] in several else of[regime] for regime in listed}


def _losses(dataset: Dataset, names: dict[Regime, str]) -> Section:
    best, gained, lost, changed = dataset.best(), gains(dataset), costs(dataset), changes(dataset)
    rows = []
    for name in dataset.optimizers:
        for regime, shown in names.items():
            cell, key = best.get((name, regime)), (name, regime)
            if cell is not None:
                seeds = "0" if cell.chosen else str(len(cell.seeds))
                rows.append([name, shown, f"{cell.record.hyper.get('lr', math.nan):g}", f"{cell.loss:.4f}", seeds])
                rows[-1] += [
                    interval_of(lost.get(key), -1.0),
                    interval_of(gained.get(key)),
                    interval_of(changed.get(key)),
                ]
    against = f"gain over {dataset.baseline}"
    header = [
        "optimizer",
        "precision",
        "best lr",
        "valid loss",
        "seeds",
        "FP8 costs",
        against,
        "gain less that without FP8",
    ]
    text = (
        "Each optimizer at the rate that was tuned in each precision. Loss: mean over the seeds that did not choose the rate, so many "
        "as the column says; 0: of the seed that chose it, too low by luck and in no comparison. Differences are paired by seed; "
        f"intervals are {LEVEL:.0%}, of a noise pooled over the table; verdicts take p after Holm's correction."
    )
    section = Section("Losses by precision", [text], tables=[Table(header, rows)])
    others = [name for name in dataset.optimizers if name != dataset.baseline]
    quantized = {pair.regime: names[pair.regime] for pair in pairs(dataset)}
    kept, cost = _comparisons(gained), _comparisons(lost, -1.0)
    section.plots += _by_precision(
        "precision-gains", f"Gain over {dataset.baseline}", "nats a token", others, names, kept
    )
    section.plots += _by_precision(
        "precision-costs", "What FP8 costs", "nats a token", dataset.optimizers, quantized, cost
    )
    return section


def _comparisons(
    found: dict[tuple[str, Regime], Comparison], sign: float = 1.0
) -> Callable[[str, Regime], Interval | None]:
    def of(name: str, regime: Regime) -> Interval | None:
        if (one := found.get((name, regime))) is None:
            return None
        ends = (
            sorted((sign * one.low, sign * one.high))
            if one.low is not None and one.high is not None
            else [sign * one.gain] * 2
        )
        return sign * one.gain, ends[0], ends[1]

    return of


def _by_precision(
    name: str,
    title: str,
    label: str,
    optimizers: list[str],
    names: dict[Regime, str],
    of: Callable[[str, Regime], Interval | None],
    line: float = 0.0,
) -> list[Plot]:
    """A figure of categories, in each the optimizers side by side with their intervals; none where there is nothing to draw."""
    shades, series = colors(optimizers), []
    for i, optimizer in enumerate(optimizers):
        aside = SPREAD * (i / max(1, len(optimizers) - 1) - 0.5)
        rows = [(at + aside, *found) for at, regime in enumerate(names) if (found := of(optimizer, regime)) is not None]
        if rows:
            series.append(Series.of(optimizer, shades[optimizer], rows, "low", "high", line=False))
    if not series:
        return []
    plot = Plot(name, title, "precision", label, series, horizontal=[(line, "")])
    plot.x_names = list(names.values())
    return [plot]


def _rates(dataset: Dataset, names: dict[Regime, str]) -> Section:
    rates, moved, rows = best_rates(dataset), shifts(dataset), []
    for name in dataset.optimizers:
        for regime, shown in names.items():
            if (found := rates.get((name, regime))) is None:
                continue
            shift = moved.get((name, regime))
            said = "–" if shift is None else f"{shift.value:.2f} ({shift.low:.2f} to {shift.high:.2f}, 90%)"
            edge = "yes" if found.edge else ""
            rows.append([name, shown, f"{found.tuned:g}", f"{math.exp(found.log_value):.3g}", said, edge])
    header = ["optimizer", "precision", "best on the grid", "vertex", "over that without FP8", "on the edge"]
    text = (
        "The vertex of a parabola through the best rate and its neighbours, in log lr, all of the seed that chose; its error is from "
        "the noise of a loss beside what its seed shares with others. On the edge, the best rate is the last that was tried."
    )
    section = Section("Best rates by precision", [text], tables=[Table(header, rows)])

    def of(name: str, regime: Regime) -> Interval | None:
        one = moved.get((name, regime))
        return None if one is None or one.edge else (one.value, one.low, one.high)

    quantized = {pair.regime: names[pair.regime] for pair in pairs(dataset)}
    title, label = "Best rate in FP8 over that without (90%)", "factor"
    section.plots += _by_precision("precision-rates", title, label, dataset.optimizers, quantized, of, line=1.0)
    return section


def _steadiness(dataset: Dataset, names: dict[Regime, str]) -> Section:
    """Diverged runs, and the largest gradient norm of each best run in its second half over the median there."""
    best, rows = dataset.best(), []
    for name in dataset.optimizers:
        for regime, shown in names.items():
            mine = [one for one in dataset.finished if (one.optimizer, one.regime) == (name, regime)]
            cell = best.get((name, regime))
            curve = dataset.curve(cell.record.id) if cell else None
            norms = [row["grad_norm"] for row in (curve.train if curve else ()) if row.get("grad_norm")]
            norms = norms[len(norms) // 2 :]
            jump = f"{max(norms) / statistics.median(norms):.2f}" if norms else "–"
            if mine:
                rows.append([name, shown, str(len(mine)), str(sum(one.status == "diverged" for one in mine)), jump])
    header = [
        "optimizer",
        "precision",
        "finished runs",
        "diverged",
        "largest gradient norm over the median, second half",
    ]
    text = (
        "MX formats were unstable elsewhere (arXiv 2506.20752), where gains of norms were quantized and clipped: to look for are runs "
        "that diverge, or norms that jump, in FP8 alone. Transformer Engine quantizes what a norm gives, and rounds MX scales up."
    )
    return Section("Steadiness", [text], tables=[Table(header, rows)])
