"""A report of a study: one HTML page that needs no network, a PNG and a CSV of every figure beside it."""

from __future__ import annotations

from pathlib import Path

from megatron_opt.errors import UserError
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.report.csv_files import write_plot_csv, write_runs_csv, write_summary_csv
from megatron_opt.study.report.page import write_page
from megatron_opt.study.report.png import write_png
from megatron_opt.study.report.sections import build_sections

__all__ = ["write_report"]


def write_report(dataset: Dataset, folder: Path, analysis: Analysis | str) -> Path:
    """Write index.html, figures/*.png, figures/*.csv, summary.csv and runs.csv; returns the page's path.

    `analysis`: the fits, or the reason why there are none. Raises UserError when the folder cannot be
    written.
    """
    figures = folder / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}; choose another folder") from None
    sections = build_sections(dataset, analysis)
    for section in sections:
        for plot in section.plots:
            write_png(plot, figures / f"{plot.name}.png")
            write_plot_csv(plot, figures / f"{plot.name}.csv")
    write_summary_csv(dataset, folder / "summary.csv")
    write_runs_csv(dataset, folder / "runs.csv")
    return write_page(dataset, sections, folder / "index.html")
