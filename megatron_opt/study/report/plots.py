"""A figure as data: the page, the PNG and the CSV are three drawings of the same thing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f3c8d",
    "#666666",
    "#b10026",
    "#4d6b00",
    "#1b1b1b",
    "#9ecae1",
    "#a6761d",
    "#b3de69",
    "#f768a1",
    "#35978f",
    "#5e4fa2",
)
"""told apart by colour-blind readers in their first six"""


@dataclass
class Series:
    """One line or point set; x and y in data units."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    line: bool = True
    points: bool = True
    dash: bool = False
    low: list[float] | None = None
    """lower end of an interval at each point, drawn as a band (lines) or bars (points)"""
    high: list[float] | None = None
    runs: list[str] | None = None
    """id of the run behind each point"""
    beyond: list[bool] | None = None
    """points that rest on an extrapolated baseline: hollow, on a hatched interval"""
    crosses: bool = False
    """points are crosses at the top of the plot: runs that diverged"""


@dataclass
class Plot:
    """One figure; `name` is its file name."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None
    note: str = ""
    vertical: list[tuple[float, str]] = field(default_factory=list)
    """vertical lines: position and label"""
    horizontal: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Drop points that cannot be drawn: not finite, or not positive on a logarithmic axis."""
        for series in self.series:
            keep = [
                i
                for i, (x, y) in enumerate(zip(series.x, series.y))
                if math.isfinite(x)
                and math.isfinite(y)
                and (x > 0 or not self.x_log)
                and (y > 0 or not self.y_log or series.crosses)
            ]
            if len(keep) < len(series.x):
                for name in ("x", "y", "low", "high", "runs", "beyond"):
                    values = getattr(series, name)
                    setattr(series, name, None if values is None else [values[i] for i in keep])


@dataclass
class Table:
    """A table of text cells, numbers already formatted."""

    header: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Section:
    """A heading of the report with what stands under it."""

    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def colors(names: list[str]) -> dict[str, str]:
    """A fixed color for each name, in order."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
