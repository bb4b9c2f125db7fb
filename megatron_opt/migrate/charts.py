"""Figures of a migration plan."""

import math
from collections.abc import Mapping, Sequence

from megatron_opt.report.blocks import PALETTE, Plot, Series

NO_GAIN = (1.0, "no gain")


def _range(values: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Limits of an axis of speedups: no lower than `least` shows, no higher than `most`."""
    finite = [value for value in values if math.isfinite(value)]
    return min([0.9, *finite]) - least, min(max([1.1, *finite]) + 0.05, most)


def intervals(rows: Sequence[tuple[str, float, float, float]], title: str, note: str) -> Plot:
    """One place a row: name, value, low and high of its interval."""
    names, values, low, high = (list(column) for column in zip(*rows))
    shown = [f"{name} {f'{value:.2f}×' if math.isfinite(value) else '∞'}" for name, value in zip(names, values)]
    x = [float(place) for place in range(len(rows))]
    series = Series("", x, values, PALETTE[0], line=False, low=low, high=high)
    axis, unit = _range([*values, *low, *high], 0.03, 3.0), "speedup, 90% interval"
    lines = [NO_GAIN]
    return Plot("intervals", title, "", unit, [series], y_range=axis, note=note, horizontal=lines, x_names=shown)


def stacks(
    name: str,
    title: str,
    unit: str,
    bars: Mapping[str, Mapping[str, float]],
    note: str,
    limit: tuple[float, str] | None = None,
) -> Plot:
    """A bar of parts for each entry; `limit` is a line with its name."""
    series, tops = [], [0.0] * len(bars)
    kinds = dict.fromkeys(kind for parts in bars.values() for kind in parts)
    for kind, color in zip(kinds, PALETTE):
        low = list(tops)
        tops = [top + parts.get(kind, 0.0) for top, parts in zip(tops, bars.values())]
        middles = [(below + above) / 2 for below, above in zip(low, tops)]
        x = [float(place) for place in range(len(bars))]
        series.append(Series(kind, x, middles, color, line=False, points=False, low=low, high=tops, bars=True))
    names = [f"{entry} {top:.4g} {unit}" for entry, top in zip(bars, tops)]
    highest = 1.08 * max([*tops, limit[0] if limit else 0.0])
    lines = [limit] if limit else []
    return Plot(name, title, "", unit, series, y_range=(0.0, highest), note=note, horizontal=lines, x_names=names)


def scatter(
    points: Sequence[tuple[float, float, float, float]],
    target: tuple[float, float, float, float],
    title: str,
    note: str,
) -> Plot:
    """Measured speedups (N, value, low, high) against model size, and the estimate at the target's."""
    series = []
    for label, color, rows in (("measured", PALETTE[0], points), ("this run", PALETTE[1], [target])):
        n, values, low, high = (list(column) for column in zip(*rows)) if rows else ([], [], [], [])
        series.append(Series(label, n, values, color, line=False, low=low, high=high))
    axis = _range([value for row in (*points, target) for value in row[1:]], 0.03, 2.2)
    x, y = "parameters without embeddings", "token speedup"
    return Plot("sizes", title, x, y, series, x_log=True, y_range=axis, note=note, horizontal=[NO_GAIN])
