"""Precision: losses and best rates with and without FP8, what FP8 tensors lose over training, and how steady runs were."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from megatron_opt.report.blocks import PALETTE, Plot, Section, Series, Table
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
from megatron_opt.study.spec import Regime

RANGES = "fp8_ranges"
"""of a logged step: kind of layer → tensor → amax, underflows, overflows (training/fp8_ranges.py)"""
LOST = ("underflows", "overflows")
Lost = dict[tuple[str, str], dict[str, float]]
"""(kind of layer, tensor) → what was logged of it"""


def precision(dataset: Dataset) -> list[Section]:
    """Empty where no model has a counterpart without FP8."""
    if not pairs(dataset):
        return []
    return [_losses(dataset), _rates(dataset), fp8_ranges(dataset), _steadiness(dataset)]


def _names(dataset: Dataset) -> dict[Regime, str]:
    """Each regime as its precision, the ones without FP8 first; the regime itself where a precision has several."""
    listed = list(dict.fromkeys([pair.plain for pair in pairs(dataset)] + [pair.regime for pair in pairs(dataset)]))
    of = {record.regime: precision_of(record) for record in dataset.records}
    several = {name for name in of.values() if sum(of[regime] == name for regime in listed) > 1}
    return {regime: str(regime) if of[regime] in several else of[regime] for regime in listed}


def _losses(dataset: Dataset) -> Section:
    names, best = _names(dataset), dataset.best()
    gained, lost, changed = gains(dataset), costs(dataset), changes(dataset)
    rows = []
    for name in dataset.optimizers:
        for regime, shown in names.items():
            cell, key = best.get((name, regime)), (name, regime)
            if cell is not None:
                cost = interval_of(lost.get(key), -1.0)
                loss = f"{cell.loss:.4f}" + (" (the seed that chose it)" if cell.chosen else "")
                rows.append([name, shown, f"{cell.record.hyper.get('lr', math.nan):g}", loss, cost])
                rows[-1] += [interval_of(gained.get(key)), interval_of(changed.get(key))]
    header = [
        "optimizer",
        "precision",
        "best lr",
        "valid loss",
        "FP8 costs",
        f"gain over {dataset.baseline}",
        "gain less that without",
    ]
    text = (
        "Each optimizer at the rate that was tuned in each precision; means over the seeds that did not choose it, differences paired "
        "by seed, with p after Holm's correction in the verdicts."
    )
    return Section("Losses by precision", [text], tables=[Table(header, rows)])


def _rates(dataset: Dataset) -> Section:
    rates, moved, rows = best_rates(dataset), shifts(dataset), []
    for name in dataset.optimizers:
        for regime, shown in _names(dataset).items():
            if (found := rates.get((name, regime))) is None:
                continue
            shift = moved.get((name, regime))
            said = "–" if shift is None else f"{shift.value:.2f} ({shift.low:.2f} to {shift.high:.2f}, 90%)"
            edge = "yes" if found.edge else ""
            rows.append([name, shown, f"{found.tuned:g}", f"{math.exp(found.log_value):.3g}", said, edge])
    header = ["optimizer", "precision", "best on the grid", "vertex", "over that without FP8", "on the edge"]
    text = "The vertex of a parabola through the best rate and its neighbours, in log lr."
    return Section("Best rates by precision", [text], tables=[Table(header, rows)])


def logged(row: Mapping[str, Any]) -> Lost:
    """What a logged step says of FP8 tensors."""
    found = row.get(RANGES) or {}
    return {(kind, tensor): values for kind, of in found.items() for tensor, values in of.items()}


def fp8_ranges(dataset: Dataset) -> Section:
    """Shares of underflows and overflows by kind of layer over steps, and at the end, of each optimizer's best run."""
    section = Section("What FP8 loses")
    best, ends = dataset.best(), dict[str, dict[str, Lost]]()
    names = _names(dataset)
    for regime in dataset.regimes:
        curves: dict[str, dict[int, Lost]] = {}
        for name in dataset.optimizers:
            cell = best.get((name, regime))
            curve = dataset.curve(cell.record.id) if cell else None
            steps = {int(row["iteration"]): of for row in (curve.train if curve else ()) if (of := logged(row))}
            if steps:
                curves[name] = steps
        if curves:
            ends[names.get(regime, str(regime))] = {name: steps[max(steps)] for name, steps in curves.items()}
            section.plots += [_over_steps(regime, lost, curves) for lost in LOST]
    if not ends:
        return section
    section.text.append(
        "Underflows are elements that become zero, overflows those that are clipped, as shares of all elements in the logged step "
        "(`--log-fp8-ranges`). Figures: means over the optimizers' best runs. Table: their last logged step, in brackets the "
        "optimizer that loses most."
    )
    places = list(dict.fromkeys(place for of in ends.values() for lost in of.values() for place in lost))
    for lost in LOST:
        rows = [[kind, tensor, *(_worst(of, (kind, tensor), lost) for of in ends.values())] for kind, tensor in places]
        section.tables.append(Table(["layer", "tensor", *ends], rows, f"Share of {lost}"))
    return section


def _over_steps(regime: Regime, lost: str, curves: dict[str, dict[int, Lost]]) -> Plot:
    steps = sorted(set.intersection(*(set(one) for one in curves.values())))
    places = list(dict.fromkeys(place for of in curves.values() for step in steps for place in of[step]))
    series = []
    for i, place in enumerate(places):
        y = [statistics.fmean(of[step].get(place, {}).get(lost, 0.0) for of in curves.values()) for step in steps]
        series.append(
            Series(" ".join(place), [float(step) for step in steps], y, PALETTE[i % len(PALETTE)], points=False)
        )
    return Plot(f"fp8-{lost}-{regime}", f"Share of {lost}, {regime}", "iteration", "share of elements", series)


def _worst(of: dict[str, Lost], place: tuple[str, str], lost: str) -> str:
    shares = {name: found[place][lost] for name, found in of.items() if place in found}
    if not shares:
        return "–"
    name = max(shares, key=shares.__getitem__)
    mean = statistics.fmean(shares.values())
    return f"{mean:.3%}" + (f" ({name} {shares[name]:.3%})" if shares[name] else "")


def _steadiness(dataset: Dataset) -> Section:
    """Diverged runs, and the largest gradient norm of each best run in its second half over the median there."""
    best, rows = dataset.best(), []
    for name in dataset.optimizers:
        for regime, shown in _names(dataset).items():
            mine = [one for one in dataset.finished if (one.optimizer, one.regime) == (name, regime)]
            cell = best.get((name, regime))
            curve = dataset.curve(cell.record.id) if cell else None
            norms = [row["grad_norm"] for row in (curve.train if curve else ()) if row.get("grad_norm")]
            norms = norms[len(norms) // 2 :]
            jump = f"{max(norms) / statistics.median(norms):.2f}" if norms else "–"
            rows.append([name, shown, str(len(mine)), str(sum(one.status == "diverged" for one in mine)), jump])
    header = [
        "optimizer",
        "precision",
        "finished runs",
        "diverged",
        "largest gradient norm over the median, second half",
    ]
    text = "MX formats were unstable elsewhere (arXiv 2506.20752): runs that diverge, or norms that jump, in FP8 alone."
    return Section("Steadiness", [text], tables=[Table(header, rows)])
