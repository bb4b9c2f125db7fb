"""`study findings`: which findings of a published comparison hold in a study, as a page in Markdown."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_opt.files import write_output
from megatron_opt.report import markdown
from megatron_opt.report.blocks import Section, Table
from megatron_opt.report.terminal import make_console
from megatron_opt.study.analysis import analyse_if_possible
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.fits.findings import MISSING, findings
from megatron_opt.study.report.accuracy import accuracy
from megatron_opt.study.report.repetition import repeated_data
from megatron_opt.study.report.transfer import transfer_over_width
from megatron_opt.study.report.wall_clock import tokens_and_time
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store
from megatron_opt.study.summary import HEADER, summary


def main(argv: list[str], prog: str) -> int:
    """Print the verdicts; write the page."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("--to", type=Path, help="file of the page (Markdown)")
    options = parser.parse_args(argv)
    with Store(options.output / STORE_NAME) as store:
        text = page(from_store(store))
    console = make_console()
    if options.to is None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        write_output(options.to, text)
        console.print(f"written to {options.to}", markup=False, soft_wrap=True)
    return 0


def page(dataset: Dataset) -> str:
    """Verdicts first, then the tables behind them."""
    judged, analysis = findings(dataset), analyse_if_possible(dataset)
    left = sum(record.status not in ("completed", "diverged") for record in dataset.records)
    lines = [
        f"# {dataset.name}: which published findings hold here",
        "",
        "Made by `megatron-opt study findings` from the study's store. Findings of the comparison of AdamW, Lion and Sophia on a "
        "fixed budget (arXiv 2507.08472); each is judged in each family of models, and only where the interval leaves one answer.",
        "",
        f"{len(dataset.finished)} runs are finished"
        + (f", {left} are not: what they would tell is missing below." if left else "."),
        "",
        *markdown.table(
            Table(
                ["finding", "where", "evidence", "verdict"],
                [
                    [one.claim, one.regime or one.family, "; ".join(one.evidence) or "–", f"**{one.verdict}**"]
                    for one in judged
                ],
            )
        ),
    ]
    if any(one.verdict == MISSING for one in judged):
        lines += ["", "“Not run”: the runs that would tell are not there."]
    results = Section("Results", tables=[Table(HEADER, [row.cells() for row in summary(dataset)])])
    sections = [results, tokens_and_time(dataset, analysis), accuracy(dataset), transfer_over_width(dataset)]
    if not isinstance(analysis, str):
        sections.append(repeated_data(analysis))
    shown = [
        replace(one, plots=[], tables=[_without_runs(table) for table in one.tables]) for one in sections if one.tables
    ]
    return "\n".join([*lines, *markdown.sections(shown)]) + "\n"


def _without_runs(table: Table) -> Table:
    """Run ids are left to the report."""
    return table.without(lambda i: table.header[i] in ("runs", "run id"))
