"""Figures as PNG files, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_opt.files import replacing_output
from megatron_opt.report.blocks import Plot, Series

matplotlib.use("Agg")
MARKERS = "osD^"
BESIDE = 8  # a longer legend stands beside the axes, as do those of bars and categories


def write_png(plot: Plot, path: Path) -> None:
    """Draw one figure, 1040 × 650 pixels."""
    figure = Figure(figsize=(8, 5), dpi=130)
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.11, top=0.92)
    if _axes(figure.add_subplot(), plot):
        figure.subplots_adjust(right=0.82)
    _write(figure, path)


def write_grid(
    plots: Sequence[Plot], columns: int, title: str, path: Path, share: Literal["row", "all"] = "row"
) -> None:
    """Draw several figures in rows of `columns`, under one title; each row, or "all", share their y-axis."""
    rows = math.ceil(len(plots) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.8 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=share, squeeze=False).flat
    for axes, plot in zip(grid, plots):
        _axes(axes, plot)
    for axes in grid[len(plots) :]:
        axes.axis("off")
    figure.suptitle(title)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    with replacing_output(path) as stream:
        figure.savefig(stream, format="png")


def _axes(axes, plot: Plot) -> bool:
    """Draw a figure into its axes; whether the legend stands beside them."""
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    if plot.x_log:
        axes.set_xscale("log")
    if plot.y_log:
        axes.set_yscale("log")
    if plot.y_range:
        axes.set_ylim(*plot.y_range)
    drawn = [series for series in plot.series if not series.crosses]
    alike: dict[str, list[str]] = {}  # labels of one color: told apart by their markers
    for series in drawn:
        labels = alike.setdefault(series.color, [])
        if series.label not in labels:
            labels.append(series.label)
        _draw(axes, series, MARKERS[labels.index(series.label) % len(MARKERS)])
    for series in plot.series:
        if series.crosses:
            top = axes.get_ylim()[1]
            axes.plot(series.x, [top] * len(series.x), "x", color=series.color, clip_on=False, label=series.label)
    for x, label in plot.vertical:
        axes.axvline(x, color="#888888", linestyle=":", linewidth=1)
        axes.annotate(label, (x, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, ha="right")
    for y, label in plot.horizontal:
        axes.axhline(y, color="#888888", linestyle=":", linewidth=1)
        axes.annotate(label, (0.01, y), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axes.grid(True, color="#e5e5e5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    xs = sorted({x for series in plot.series if series.points for x in series.x})
    if plot.x_log and 0 < len(xs) <= 8:
        axes.set_xticks(xs)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if plot.x_names:
        axes.set_xticks(range(len(plot.x_names)), [fill(name, 80 // len(plot.x_names)) for name in plot.x_names])
        axes.set_xlim(-0.5, len(plot.x_names) - 0.5)
    labels = [series.label for series in plot.series if series.label]
    bars = any(series.bars for series in plot.series)
    beside = len(labels) > BESIDE or bars or bool(plot.x_names)
    if bars:
        axes.set_axisbelow(True)
    if beside:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    elif labels:
        axes.legend(fontsize=8, frameon=False)
    return beside


def _draw(axes, series: Series, marker: str) -> None:
    style = ("--" if series.dash else "-") if series.line else "none"
    if series.bars:
        heights = [high - low for low, high in zip(series.low or (), series.high or ())]
        axes.bar(series.x, heights, 0.6, bottom=series.low, color=series.color, label=series.label or None)
        return
    if series.low is not None and series.high is not None:
        if series.line:
            axes.fill_between(series.x, series.low, series.high, color=series.color, alpha=0.15, linewidth=0)
        else:
            axes.vlines(series.x, series.low, series.high, color=series.color, linewidth=1)
    axes.plot(
        series.x,
        series.y,
        linestyle=style,
        marker=marker if series.points else None,
        markersize=4,
        color=series.color,
        linewidth=1.5,
        label=series.label or None,
    )
    for x, y, low, high, beyond in zip(
        series.x, series.y, series.low or series.y, series.high or series.y, series.beyond or [False] * len(series.x)
    ):
        if beyond:
            corner = (
                {"left": x * 0.97, "width": x * 0.06}
                if axes.get_xscale() == "log"
                else {"left": x - 0.02, "width": 0.04}
            )
            axes.bar(
                corner["left"],
                high - low,
                corner["width"],
                bottom=low,
                align="edge",
                fill=False,
                hatch="//////",
                edgecolor=series.color,
                linewidth=0,
            )
            axes.plot([x], [y], marker=marker, markersize=5, color=series.color, markerfacecolor="white")
