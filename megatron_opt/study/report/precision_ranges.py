"""What FP8 tensors lose by kind of layer: their largest numbers, underflows and overflows, at the end and over training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opt.report.blocks import PALETTE, Plot, Section, Series, Table, colors
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.spec import Regime

RANGES = "fp8_ranges"
"""of a logged step: kind of layer → tensor → amax, underflows, overflows (training/fp8_ranges.py)"""
LOST = ("underflows", "overflows")
SEEN = 5e-6
"""a share that three digits of a per cent show"""
Place = tuple[str, str]
"""kind of layer, tensor"""
Lost = dict[Place, dict[str, float]]
"""what was logged of each place in one step"""
Logged = dict[Regime, dict[str, dict[int, Lost]]]
"""regime → optimizer → step → what its best run logged; only regimes and optimizers that have logged"""


@dataclass
class Grid:
    """A figure of several panels, which stand in rows of `columns`."""

    name: str
    title: str
    panels: list[Plot]
    columns: int


def logged(row: Mapping[str, Any]) -> Lost:
    """What a logged step says of FP8 tensors."""
    found = row.get(RANGES) or {}
    return {(kind, tensor): values for kind, of in found.items() for tensor, values in of.items()}


def logged_ranges(dataset: Dataset) -> Logged:
    """What the best run of each optimizer in each regime has logged."""
    best, found = dataset.best(), Logged()
    for regime in dataset.regimes:
        for name in dataset.optimizers:
            cell = best.get((name, regime))
            curve = dataset.curve(cell.record.id) if cell else None
            steps = {int(row["iteration"]): of for row in (curve.train if curve else ()) if (of := logged(row))}
            if steps:
                found.setdefault(regime, {})[name] = steps
    return found


def _places(every: Iterable[Lost]) -> list[Place]:
    return list(dict.fromkeys(place for one in every for place in one))


def _last(steps: dict[int, Lost]) -> Lost:
    return steps[max(steps)]


def fp8_ranges(dataset: Dataset, names: dict[Regime, str]) -> Section:
    """Shares of underflows and overflows and largest numbers by kind of layer, of each optimizer's best run; `names` of regimes."""
    section, found = Section("What FP8 loses"), logged_ranges(dataset)
    if not found:
        return section
    for regime, curves in found.items():
        section.plots += [_over_steps(regime, lost, curves) for lost in LOST]
    ends = {names.get(regime, str(regime)): {n: _last(s) for n, s in of.items()} for regime, of in found.items()}
    places = _places(lost for of in ends.values() for lost in of.values())
    section.text.append(
        "Underflows are elements that become zero, overflows those that are clipped, as shares of all elements in the logged step "
        "(`--log-fp8-ranges`); the largest number (amax) is that before the cast. Figures: means over the optimizers' best runs. "
        "Tables: their last logged step, in brackets the optimizer that loses most."
    )
    section.text.append(" ".join(_said(name, of, places) for name, of in ends.items()))
    for lost in LOST:
        rows = [[kind, tensor, *(_worst(of, (kind, tensor), lost) for of in ends.values())] for kind, tensor in places]
        if any(found != "–" and not found.startswith("0.000%") for _, _, *cells in rows for found in cells):
            section.tables.append(Table(["layer", "tensor", *ends], rows, f"Share of {lost}"))
    optimizers = [name for name in dataset.optimizers if any(name in of for of in ends.values())]
    rows = [[kind, tensor, *(_largest(ends, name, (kind, tensor)) for name in optimizers)] for kind, tensor in places]
    section.tables.append(Table(["layer", "tensor", *optimizers], rows, "Largest number, median over precisions"))
    return section


def _said(name: str, of: dict[str, Lost], places: list[Place]) -> str:
    """One sentence: where most is lost in this precision, means over optimizers."""
    parts = []
    for lost in LOST:
        shares = {place: statistics.fmean(shares) for place in places if (shares := _shares(of, place, lost).values())}
        worst = max(shares, key=shares.__getitem__)
        most = f"{lost} up to {shares[worst]:.3%} ({worst[1]} of {worst[0]})"
        parts.append(most if shares[worst] else f"no {lost}")
    return f"**{name}**: {', '.join(parts)}."


def _shares(of: dict[str, Lost], place: Place, lost: str) -> dict[str, float]:
    return {name: found[place][lost] for name, found in of.items() if place in found}


def _worst(of: dict[str, Lost], place: Place, lost: str) -> str:
    shares = _shares(of, place, lost)
    if not shares:
        return "–"
    name = max(shares, key=shares.__getitem__)
    mean = statistics.fmean(shares.values())
    return f"{mean:.3%}" + (f" ({name} {shares[name]:.3%})" if shares[name] >= SEEN else "")


def _largest(ends: dict[str, dict[str, Lost]], name: str, place: Place) -> str:
    found = [of[name][place]["amax"] for of in ends.values() if name in of and place in of[name]]
    return f"{statistics.median(found):.3g}" if found else "–"


def _over_steps(regime: Regime, lost: str, curves: dict[str, dict[int, Lost]]) -> Plot:
    steps = sorted(set.intersection(*(set(one) for one in curves.values())))
    places = _places(of[step] for of in curves.values() for step in steps)
    series = []
    for i, place in enumerate(places):
        y = [statistics.fmean(of[step].get(place, {}).get(lost, 0.0) for of in curves.values()) for step in steps]
        series.append(
            Series(" ".join(place), [float(step) for step in steps], y, PALETTE[i % len(PALETTE)], points=False)
        )
    return Plot(f"fp8-{lost}-{regime}", f"Share of {lost}, {regime}", "iteration", "share of elements", series)


def grids(dataset: Dataset, names: dict[Regime, str]) -> list[Grid]:
    """Over training, a panel for each tensor (rows) and kind of layer (columns).

    Shares of elements lost: a line a precision, means over optimizers. Largest numbers: a line an optimizer, medians over precisions.
    """
    found = logged_ranges(dataset)
    curves = {names.get(regime, str(regime)): of for regime, of in found.items()}
    places = _places(lost for of in curves.values() for steps in of.values() for lost in steps.values())
    if not places:
        return []
    drawn, by_precision = [], {name: list(of.values()) for name, of in curves.items()}
    for lost in LOST:
        grid = _grid(f"precision-{lost}", f"Share of elements: {lost}", by_precision, places, lost, statistics.fmean)
        if any(value for panel in grid.panels for series in panel.series for value in series.y):
            drawn.append(grid)
    by_optimizer = {
        name: chosen for name in dataset.optimizers if (chosen := [of[name] for of in curves.values() if name in of])
    }
    title = "Largest number before the cast"
    drawn.append(_grid("precision-amax", title, by_optimizer, places, "amax", statistics.median, y_log=True))
    return drawn


def _grid(
    name: str,
    title: str,
    lines: dict[str, list[dict[int, Lost]]],
    places: list[Place],
    key: str,
    mean: Callable[[list[float]], float],
    y_log: bool = False,
) -> Grid:
    kinds, tensors = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    shades = colors(list(lines))
    panels: list[Plot] = []
    for tensor in tensors:
        for kind in kinds:
            panel = Plot(f"{name}-{kind}-{tensor}", f"{tensor} of {kind}", "iteration", "", [], y_log=y_log)
            for label, runs in lines.items():
                steps = sorted({step for run in runs for step in run})
                seen = {
                    step: [run[step][kind, tensor][key] for run in runs if (kind, tensor) in run.get(step, {})]
                    for step in steps
                }
                y = {step: float(mean(values)) for step, values in seen.items() if values}
                shown = label if not panels else ""  # one legend
                panel.series.append(Series(shown, list(map(float, y)), list(y.values()), shades[label], points=False))
            panels.append(panel)
    return Grid(name, title, panels, len(kinds))
