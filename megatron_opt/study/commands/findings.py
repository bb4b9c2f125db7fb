"""`study findings`: what a study shows, which findings of a published comparison hold in it, or what FP8 does, as Markdown."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_opt.files import make_folder, write_output
from megatron_opt.report import markdown
from megatron_opt.report.blocks import Plot, Section, Table
from megatron_opt.report.png import write_grid, write_png
from megatron_opt.report.terminal import make_console
from megatron_opt.study.analysis import Unfitted, analyse_if_possible
from megatron_opt.study.commands.pricing import cluster_times
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.fits.findings import MISSING, Finding, findings
from megatron_opt.study.fits.precision import in_short, pairs, precision_findings
from megatron_opt.study.fits.wall_clock import ClusterTimes
from megatron_opt.study.registration import predictions
from megatron_opt.study.report.accuracy import accuracy
from megatron_opt.study.report.averaged_weights import averaged_weights
from megatron_opt.study.report.extrapolation import extrapolation, prediction_error, verdict
from megatron_opt.study.report.precision import precision, precision_names
from megatron_opt.study.report.precision_ranges import grids
from megatron_opt.study.report.registered import registered
from megatron_opt.study.report.repetition import repeated_data
from megatron_opt.study.report.scaling import final_losses, gains, significance
from megatron_opt.study.report.transfer import transfer_over_width
from megatron_opt.study.report.wall_clock import tokens_and_time
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store
from megatron_opt.study.summary import HEADER, summary

SHOWN = ("gain-against-size", "precision-", "accuracy-", "transfer-")
"""how the names of figures begin that a page shows"""


def main(argv: list[str], prog: str) -> int:
    """Print the verdicts; write the page."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("--to", type=Path, help="file of the page (Markdown)")
    options = parser.parse_args(argv)
    with Store(options.output / STORE_NAME) as store:
        dataset = from_store(store)
        scored = [registered(path.name, content, dataset) for path, content in predictions(store)]
        cluster = cluster_times(dataset.cluster, dataset, dataset.target[0])
        text = page(dataset, scored, options.to, cluster)
    console = make_console()
    if options.to is None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        write_output(options.to, text)
        console.print(f"written to {options.to}", markup=False, soft_wrap=True)
    return 0


def page(
    dataset: Dataset, scored: Sequence[Section] = (), to: Path | None = None, cluster: ClusterTimes | None = None
) -> str:
    """Verdicts first, then the tables behind them; what FP8 does, where the study has models in it beside the same in bf16.

    Figures of gains lie in a folder beside the page's file `to`, named like it. `cluster`: what steps take elsewhere.
    """
    published = {"lion", "sophia"} <= set(dataset.optimizers)
    kind = _of_precision if pairs(dataset) else _of_budget if published else _of_gains
    title, groups, sections = kind(dataset, cluster)
    sections += [averaged_weights(dataset), *scored]
    left = sum(record.status not in ("completed", "diverged") for record in dataset.records)
    reached = {record.regime for record in dataset.finished}
    untouched = [str(regime) for regime in dataset.sizes if regime not in reached]
    lines = [
        *title,
        "",
        f"{len(dataset.finished)} runs are finished"
        + (f", {left} are not: what they would tell is missing below." if left else "."),
        *([f"No run of {', '.join(untouched)} is finished."] if untouched else []),
    ]
    for question, judged in groups.items():
        counts = ", ".join(f"{said} {n}" for said, n in Counter(one.verdict for one in judged).items())
        lines += ["", f"## {question}", "", f"{counts[:1].upper()}{counts[1:]}."] if question else []
        judged = [one for one in judged if one.verdict != MISSING or not question]  # counted above
        rows = [[o.claim, o.regime or o.family, "; ".join(o.evidence) or "–", f"**{o.verdict}**"] for o in judged]
        lines += ["", *markdown.table(Table(["finding", "where", "evidence", "verdict"], rows))] if rows else []
    if any(one.verdict == MISSING for judged in groups.values() for one in judged):
        lines += ["", "“Not run”: the runs that would tell are not there."]
    results = Section("Results", tables=[Table(HEADER, [row.cells() for row in summary(dataset)])])
    shown = [
        replace(one, plots=_drawn(one.plots, to), tables=[_without_runs(table) for table in one.tables])
        for one in (results, *sections, *_over_training(dataset, to))
        if one.tables or one.text or one.plots
    ]
    return "\n".join([*lines, *markdown.sections(shown)]) + "\n"


def _drawn(plots: Sequence[Plot], to: Path | None) -> list[Plot]:
    if to is None:
        return []
    chosen = [plot for plot in plots if plot.name.startswith(SHOWN)]
    for plot in (one for one in chosen if not one.image):
        plot.image = f"{to.stem}/{plot.name}.png"
        write_png(plot, make_folder(to.parent / to.stem) / f"{plot.name}.png")
    return chosen


def _over_training(dataset: Dataset, to: Path | None) -> list[Section]:
    """Figures of what FP8 loses by tensor and kind of layer, drawn beside the page."""
    made = grids(dataset, precision_names(dataset)) if to is not None and pairs(dataset) else []
    if to is None or not made:
        return []
    section = Section("What FP8 loses over training")
    for grid in made:
        write_grid(grid.panels, grid.columns, grid.title, make_folder(to.parent / to.stem) / f"{grid.name}.png", "row")
        section.plots.append(Plot(grid.name, grid.title, "", "", [], image=f"{to.stem}/{grid.name}.png"))
    return [section]


def _without_runs(table: Table) -> Table:
    """Run ids are left to the report."""
    return table.without(lambda i: table.header[i] in ("runs", "run id"))


Page = tuple[list[str], dict[str, list[Finding]], list[Section]]
"""title and introduction; findings by question ("": of one list); what stands behind them"""


def _of_budget(dataset: Dataset, cluster: ClusterTimes | None) -> Page:
    title = [
        f"# {dataset.name}: which published findings hold here",
        "",
        "Made by `megatron-opt study findings` from the study's store. Findings of the comparison of AdamW, Lion and Sophia on a "
        "fixed budget (arXiv 2507.08472); each is judged in each family of models, and only where the interval leaves one answer.",
    ]
    analysis = analyse_if_possible(dataset, cluster=cluster)
    sections = [tokens_and_time(dataset, analysis.wall), accuracy(dataset), transfer_over_width(dataset)]
    if not isinstance(analysis, Unfitted):
        sections.append(repeated_data(analysis))
    return title, {"": findings(dataset)}, sections


def _of_gains(dataset: Dataset, cluster: ClusterTimes | None) -> Page:
    title = [
        f"# {dataset.name}: what this study shows",
        "",
        "Made by `megatron-opt study findings` from the study's store; the study's report has the figures and every run.",
    ]
    analysis = analyse_if_possible(dataset, cluster=cluster)
    time, tasks = tokens_and_time(dataset, analysis.wall), accuracy(dataset)
    if isinstance(analysis, Unfitted):
        return [*title, "", analysis.reason], {}, [time, tasks]
    sections = [verdict(analysis), significance(analysis), gains(analysis), final_losses(analysis)]
    sections += [prediction_error(analysis), extrapolation(analysis), time, tasks]
    return title, {}, sections


def _of_precision(dataset: Dataset, _cluster: ClusterTimes | None) -> Page:
    found, names = precision_findings(dataset), precision_names(dataset)
    title = [
        f"# {dataset.name}: what FP8 does to optimizers",
        "",
        "Made by `megatron-opt study findings` from the study's store. Every optimizer is tuned in every precision and paired by seed "
        "with itself without FP8; FP8 is emulated where the runs had no GPU ([what differs](transformer_engine.md)). “Holds” and "
        "“does not hold” are said only where the interval leaves one answer: 95% for losses, p after Holm's correction over each "
        "table; 90% for rates, which stay where the interval holds 1 and nothing beyond a factor of two.",
        "",
        _size(dataset),
        "",
        *(f"- {sentence}" for sentence in in_short(found, {str(regime): name for regime, name in names.items()})),
    ]
    return title, found, precision(dataset)


def _size(dataset: Dataset) -> str:
    """What was run, on how many seeds a comparison rests, and which seed is in none."""
    best = dataset.best().values()
    sizes, tokens = ({getattr(one, key) for one in dataset.records} for key in ("parameters", "tokens"))
    counts = [0 if cell.chosen else len(cell.seeds) for cell in best]
    chose = sorted({str(cell.record.seed) for cell in best if cell.chosen or cell.record.seed not in cell.seeds})
    said = f"{_range(sizes)} non-embedding parameters, {_range(tokens)} tokens a run; nothing is said of other sizes. "
    if not counts:
        return said.strip()
    over = f"A loss is the mean over {_range(counts)} seeds" if max(counts) else "No seed was repeated"
    return f"{said}{over}" + (
        f"; rates were chosen on seed {' and '.join(chose)}, which is in no comparison." if chose else "."
    )


def _range(values: Collection[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
