"""The study's numbers as CSV, one row a configuration or a run."""

from __future__ import annotations

from pathlib import Path

from megatron_opt.report.csv_files import write_csv
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.exchange import COLUMNS, complete, row_of
from megatron_opt.study.summary import HEADER, summary


def write_summary_csv(dataset: Dataset, path: Path) -> None:
    """The result table."""
    write_csv(path, HEADER, [row.cells() for row in summary(dataset)])


def write_runs_csv(dataset: Dataset, path: Path) -> None:
    """Every run of the study, finished or not, in the columns of `study export`, which `study import` reads."""
    rows = complete([row_of(record) for record in dataset.records], dataset.phases, dataset.settings)
    write_csv(path, COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
