"""What a report is made of, as data: the page, Markdown, PNG and CSV are drawings of the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    bars: bool = False
    """rectangles from `low` to `high`: parts of stacked bars"""

    @classmethod
    def of(cls, label: str, color: str, rows: Iterable[Sequence[Any]], *more: str, **style: bool) -> Series:
        """From rows: x, y, and what `more` names, such as "low", "high", "runs"."""
        columns = [list(column) for column in zip(*rows)] or [[] for _ in range(2 + len(more))]
        x, y, *others = columns
        return cls(label, x, y, color, **style, **dict(zip(more, others)))  # type: ignore[arg-type]


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
    image: str = ""
    """where a page in Markdown finds the figure"""
    vertical: list[tuple[float, str]] = field(default_factory=list)
    """vertical lines: position and label"""
    horizontal: list[tuple[float, str]] = field(default_factory=list)
    x_names: list[str] = field(default_factory=list)
    """of categories, which stand at x = 0, 1, …"""

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

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def words(self) -> list[bool]:
        """By column, whether it holds words, which stand to the left; numbers stand to the right."""
        return [any(row[i].lstrip("`")[:1].isalpha() for row in self.rows) for i in range(len(self.header))]

    def without(self, unwanted: Callable[[int], bool]) -> Table:
        """The table less the columns whose place is unwanted."""
        keep = [i for i in range(len(self.header)) if not unwanted(i)]
        return Table([self.header[i] for i in keep], [[row[i] for i in keep] for row in self.rows], self.caption)


@dataclass
class Items:
    """A list of sentences; with `marks`, a word before each (a severity, say)."""

    sentences: Sequence[str]
    marks: Sequence[str] = ()

    def marked(self) -> Iterator[tuple[str, str]]:
        """Each sentence behind its mark, which may be empty."""
        return zip(self.marks or [""] * len(self.sentences), self.sentences, strict=True)


@dataclass
class Code:
    """A command line."""

    text: str


Block = str | Plot | Table | Items | Code


@dataclass
class Section:
    """A heading of the report with what stands under it: by kind, then `blocks` in their own order."""

    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def plot(self, name: str, title: str, x_label: str, y_label: str, series: list[Series], **axes: Any) -> None:
        """Add a figure, where there is something to draw."""
        if series:
            self.plots.append(Plot(name, title, x_label, y_label, series, **axes))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Add a table, where it has rows."""
        if rows:
            self.tables.append(Table(header, rows, caption))


def colors(names: Sequence[str]) -> dict[str, str]:
    """A fixed color for each name, in order."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
