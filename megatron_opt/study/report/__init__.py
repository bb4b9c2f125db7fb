"""A report of a study: one HTML page that needs no network, a PNG and a CSV of every figure beside it."""

from __future__ import annotations

import time
from html import escape
from pathlib import Path

from megatron_opt import __version__
from megatron_opt.files import make_folder, write_output
from megatron_opt.report.csv_files import write_plot_csv
from megatron_opt.report.page import render
from megatron_opt.report.png import write_png
from megatron_opt.study.analysis import Analysis, Unfitted
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.report.csv_files import write_runs_csv, write_summary_csv
from megatron_opt.study.report.sections import build_sections

__all__ = ["write_report"]


def write_report(dataset: Dataset, folder: Path, analysis: Analysis | Unfitted) -> Path:
    """Write index.html, figures/*.png, figures/*.csv, summary.csv and runs.csv; returns the page's path.

    `analysis`: the fits, or the reason why there are none. Raises UserError when the folder cannot be
    written.
    """
    figures = make_folder(folder / "figures")
    sections = build_sections(dataset, analysis)
    for section in sections:
        for plot in section.plots:
            write_png(plot, figures / f"{plot.name}.png")
            write_plot_csv(plot, figures / f"{plot.name}.csv")
    write_summary_csv(dataset, folder / "summary.csv")
    write_runs_csv(dataset, folder / "runs.csv")
    write_output(folder / "index.html", render(f"{dataset.name}: optimizer study", _lead(dataset), sections))
    return folder / "index.html"


def _lead(dataset: Dataset) -> str:
    """What stands under the page's title."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"<p>{len(dataset.finished)} of {len(dataset.records)} runs finished · baseline {escape(dataset.baseline)} · "
        f"megatron_opt {__version__} · {written}</p>"
        '<p>Hover over a point for its run; <a href="runs.csv">runs.csv</a> lists every run, figures/ has '
        "each figure as PNG and CSV.</p>"
    ) + (f"<p>{escape(dataset.attribution)}</p>" if dataset.attribution else "")
