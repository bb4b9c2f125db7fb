"""`study fit` and `study demo-paper`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_opt.report.terminal import make_console, print_table
from megatron_opt.study.analysis import Analysis, analyse
from megatron_opt.study.commands.pricing import cluster_times
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.fit_files import write_fits
from megatron_opt.study.paper_data import hyperball_dataset, paper_dataset
from megatron_opt.study.report import write_report
from megatron_opt.study.report.extrapolation import extrapolation, prediction_error
from megatron_opt.study.report.repetition import repeated_data
from megatron_opt.study.report.scaling import significance, speedup_section
from megatron_opt.study.report.wall_clock import tokens_and_time
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store

DATASETS = {"fantastic": paper_dataset, "hyperball": hyperball_dataset}


def add_fit_options(parser: argparse.ArgumentParser) -> None:
    """What `fit`, `report` and `demo-paper` share."""
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="fit these and the baseline only")
    add_without(parser)
    parser.add_argument("--target", type=float, help="parameters to extrapolate to (default: the study's, or 7e9)")
    parser.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        help="Chinchilla ratios to extrapolate to (default: the study's, or 1 2 4 8 16)",
    )
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap copies behind every interval")
    parser.add_argument(
        "--cluster",
        metavar="NAME|FILE",
        help="h100, a cluster file, …: token speedups in time there, by the cost model",
    )


def add_without(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="MODEL@RATIO",
        help="leave these regimes out, such as one whose baseline is not there",
    )


def fit_arguments(options: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """The options as arguments of `analyse`; the cluster is the study's own where none is named."""
    return {
        "optimizers": options.optimizers,
        "target": options.target,
        "ratios": options.ratios and tuple(options.ratios),
        "resamples": options.resamples,
        "cluster": cluster_times(options.cluster or dataset.cluster, dataset, options.target or dataset.target[0]),
    }


def print_analysis(console: Console, analysis: Analysis) -> None:
    """What can be said at the target, then speedups, backtests and laws as tables, then what could not be settled."""
    statement = analysis.statement
    if statement is not None:
        for sentence in statement.sentences():
            console.print(sentence, markup=False, highlight=False)
    for section in (
        significance(analysis),
        speedup_section(analysis),
        tokens_and_time(analysis.dataset, analysis.wall),
        repeated_data(analysis),
        prediction_error(analysis),
        extrapolation(analysis),
    ):
        for table in section.tables:
            print_table(console, table.header, table.rows, table.caption or section.title)
    if statement is not None:
        for crossing in statement.crossings:
            if crossing.ratio == statement.ratios[0]:
                console.print(crossing.sentence(statement.baseline), markup=False, highlight=False)
        for sentence in statement.calibration:
            console.print(sentence, markup=False, highlight=False)
    for note in analysis.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def main(argv: list[str], prog: str) -> int:
    """Fit the runs of a store; writes OUTPUT/fits.json."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    add_fit_options(parser)
    options = parser.parse_args(argv)
    with Store(options.output / STORE_NAME) as store:
        dataset = from_store(store).without(options.without)
        analysis = analyse(dataset, **fit_arguments(options, dataset))
        write_fits(analysis, options.output / "fits.json")
    console = make_console()
    print_analysis(console, analysis)
    console.print(f"fits: {options.output / 'fits.json'}", soft_wrap=True, markup=False)
    return 0


def demo_paper(argv: list[str], prog: str) -> int:
    """Fit and report the published study without training anything."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("--output", type=Path, default=Path("paper-study"), help="folder of the report")
    parser.add_argument("--data", choices=sorted(DATASETS), default="fantastic", help="which publication")
    add_fit_options(parser)
    options = parser.parse_args(argv)
    dataset = DATASETS[options.data]().without(options.without)
    analysis = analyse(dataset, **fit_arguments(options, dataset))
    options.output.mkdir(parents=True, exist_ok=True)
    page = write_report(dataset, options.output, analysis)
    write_fits(analysis, options.output / "fits.json")
    console = make_console()
    print_analysis(console, analysis)
    if analysis.ensemble is not None and analysis.ensemble.backtests:
        error = analysis.ensemble.backtests[-1].error
        console.print(
            f"Largest size predicted from the smaller ones: error {np.sqrt(np.mean(error**2)):.4f}, noise of one loss "
            f"{analysis.noise.sigma:g}."
        )
    console.print(f"report: {page}", soft_wrap=True, markup=False)
    return 0
