"""What the report shows, in reading order."""

from __future__ import annotations

import math

from megatron_opt.report.blocks import Section, Table
from megatron_opt.study.analysis import Analysis, Unfitted
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.report.accuracy import accuracy
from megatron_opt.study.report.averaged_weights import averaged_weights
from megatron_opt.study.report.costs import costs
from megatron_opt.study.report.curves import loss_curves
from megatron_opt.study.report.dynamics import dynamics
from megatron_opt.study.report.extrapolation import extrapolation, prediction_error, verdict
from megatron_opt.study.report.pitfalls import pitfalls
from megatron_opt.study.report.precision import precision
from megatron_opt.study.report.repetition import repeated_data
from megatron_opt.study.report.scaling import final_losses, gains, significance, speedup_section
from megatron_opt.study.report.search import search
from megatron_opt.study.report.sensitivity import lr_sensitivity
from megatron_opt.study.report.transfer import transfer_over_width
from megatron_opt.study.report.tuning import hyper_laws, transfer
from megatron_opt.study.report.wall_clock import tokens_and_time
from megatron_opt.study.summary import HEADER, summary

TEXT_ALONE = ("What can be said", "Notes")
"""sections that need neither figure nor table"""


def build_sections(dataset: Dataset, analysis: Analysis | Unfitted) -> list[Section]:
    """Every section that the data can fill; with a reason instead of fits, those that need no fit."""
    fitted, laws, lead = [], [], []
    notes = [analysis.reason] if isinstance(analysis, Unfitted) else analysis.notes
    if isinstance(analysis, Unfitted):
        lead = [Section("What can be said", [analysis.reason])]
    else:
        fitted = [significance(analysis), gains(analysis), speedup_section(analysis), final_losses(analysis)]
        fitted += [repeated_data(analysis), prediction_error(analysis), extrapolation(analysis)]
        laws, lead = [hyper_laws(analysis)], [verdict(analysis)]
    sections = [
        *lead,
        _results(dataset),
        tokens_and_time(dataset, analysis.wall),
        accuracy(dataset),
        averaged_weights(dataset),
        *precision(dataset),
        _pitfalls(dataset),
        *fitted,
        search(dataset),
        transfer_over_width(dataset),
        lr_sensitivity(dataset),
        *laws,
    ]
    sections += [
        _samples(dataset),
        transfer(dataset),
        loss_curves(dataset),
        costs(dataset),
        dynamics(dataset),
        _effort(dataset),
    ]
    sections.append(Section("Notes", text=notes))
    return [s for s in sections if s.plots or s.tables or s.warnings or (s.text and s.title in TEXT_ALONE)]


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


def _samples(dataset: Dataset) -> Section:
    section, by_id = Section("Samples"), {record.id: record for record in dataset.records}
    rows = [[by_id[run].optimizer, str(by_id[run].regime), text, run] for run, text in dataset.samples.items()]
    if rows:
        section.text = ["How the best runs go on from the study's prompt: a look, not a measure."]
        section.tables.append(Table(["optimizer", "regime", "text", "run id"], rows))
    return section


def _pitfalls(dataset: Dataset) -> Section:
    return Section("Pitfalls found", warnings=pitfalls(dataset))


def _effort(dataset: Dataset) -> Section:
    header = ["optimizer", "runs", "completed", "diverged", "failed", "waiting", "training hours"]
    rows = []
    for name in dataset.optimizers:
        mine = [record for record in dataset.records if record.optimizer == name]
        count = {state: sum(r.status == state for r in mine) for state in ("completed", "diverged", "failed")}
        hours = math.fsum(r.results.get("train_time_s") or 0.0 for r in mine) / 3600
        waiting = len(mine) - sum(count.values())
        rows.append([name, str(len(mine)), *map(str, count.values()), str(waiting), f"{hours:.2f}"])
    text = "The minimum over more runs is lower by chance alone; equal counts are fair."
    return Section("Tuning effort", [text], tables=[Table(header, rows)])
