"""Tables and figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_opt.files import write_output
from megatron_opt.report.blocks import Plot


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A header and a line a row."""
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
                    plot.x_names[round(x)] if plot.x_names else x,
                    "" if series.crosses else series.y[i],
                    series.low[i] if series.low else "",
                    series.high[i] if series.high else "",
                    series.runs[i] if series.runs else "",
                    int(series.beyond[i]) if series.beyond else "",
                ]
            )
    write_csv(path, ["series", plot.x_label, plot.y_label, "low", "high", "run", "extrapolated"], rows)
