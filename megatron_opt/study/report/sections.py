"""What the report shows, in reading order."""

from __future__ import annotations

import math

from megatron_opt.study.dataset import Dataset
from megatron_opt.study.report.curves import loss_curves
from megatron_opt.study.report.plots import Section, Table
from megatron_opt.study.report.sensitivity import lr_sensitivity
from megatron_opt.study.summary import HEADER, summary


def build_sections(dataset: Dataset) -> list[Section]:
    """Every section that the data can fill."""
    sections = [_results(dataset), lr_sensitivity(dataset), loss_curves(dataset), _effort(dataset)]
    return [section for section in sections if section.plots or section.tables or section.warnings]


def _results(dataset: Dataset) -> Section:
    rows = summary(dataset)
    section = Section("Results", tables=[Table(HEADER, [row.cells() for row in rows])])
    section.text.append(
        "Final validation loss of the best configuration of each optimizer, at the end of its "
        "schedule and at the "
        "same number of tokens. Lower is better. “runs” counts everything tried in that regime."
    )
    if not rows:
        section.warnings.append("No run has finished yet.")
    return section


def _effort(dataset: Dataset) -> Section:
    header = ["optimizer", "runs", "completed", "diverged", "failed", "waiting", "training hours"]
    rows = []
    for name in dataset.optimizers:
        mine = [record for record in dataset.records if record.optimizer == name]
        count = {state: sum(r.status == state for r in mine) for state in ("completed", "diverged", "failed")}
        hours = math.fsum(r.results.get("train_time_s") or 0.0 for r in mine) / 3600
        waiting = len(mine) - sum(count.values())
        rows.append([name, str(len(mine)), *map(str, count.values()), str(waiting), f"{hours:.2f}"])
    return Section(
        "Tuning effort",
        ["The minimum over more runs is lower by chance alone; equal counts are fair."],
        tables=[Table(header, rows)],
    )
