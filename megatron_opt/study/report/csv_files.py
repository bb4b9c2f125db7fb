"""The report's numbers as CSV, one row a point or a run."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from megatron_opt.files import write_output
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.exchange import COLUMNS, row_of
from megatron_opt.study.report.plots import Plot
from megatron_opt.study.summary import HEADER, summary


def _write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_output(path, text.getvalue())


def write_plot_csv(plot: Plot, path: Path) -> None:
    """Columns: series, x, y, low, high, run, extrapolated; y is empty where the run diverged."""
    rows = []
    for series in plot.series:
        for i, x in enumerate(series.x):
            rows.append(
                [
                    series.label,
                    x,
                    "" if series.crosses else series.y[i],
                    series.low[i] if series.low else "",
                    series.high[i] if series.high else "",
                    series.runs[i] if series.runs else "",
                    int(series.beyond[i]) if series.beyond else "",
                ]
            )
    _write(path, ["series", plot.x_label, plot.y_label, "low", "high", "run", "extrapolated"], rows)


def write_summary_csv(dataset: Dataset, path: Path) -> None:
    """The result table."""
    _write(path, HEADER, [row.cells() for row in summary(dataset)])


def write_runs_csv(dataset: Dataset, path: Path) -> None:
    """Every run of the study, finished or not, in the columns of `study export`, which `study import` reads."""
    phases: dict[str, list[str]] = {}
    for phase, runs in dataset.phases.items():
        for run in runs:
            phases.setdefault(run, []).append(phase)
    rows = [row_of(record, phases.get(record.id, [])) for record in dataset.records]
    _write(path, list(COLUMNS), [[row[name] for name in COLUMNS] for row in rows])
