"""Figures as PNG files, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_opt.files import replacing_output
from megatron_opt.study.report.plots import Plot, Series

matplotlib.use("Agg")
MARKERS = "osD^"
BESIDE = 8  # a longer legend stands beside the axes


def write_png(plot: Plot, path: Path) -> None:
    """Draw one figure, 1040 × 650 pixels."""
    figure = Figure(figsize=(8, 5), dpi=130)
    figure.subplots_adjust(left=0.11, right=0.97, bottom=0.11, top=0.92)
    axes = figure.add_subplot()
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
    labels = [series.label for series in plot.series if series.label]
    if len(labels) > BESIDE:
        figure.subplots_adjust(right=0.82)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    elif labels:
        axes.legend(fontsize=8, frameon=False)
    with replacing_output(path) as stream:
        figure.savefig(stream, format="png")


def _draw(axes, series: Series, marker: str) -> None:
    style = ("--" if series.dash else "-") if series.line else "none"
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
