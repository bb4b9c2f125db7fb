"""`study report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opt.report.terminal import make_console
from megatron_opt.study.analysis import analyse_if_possible
from megatron_opt.study.commands.fitting import add_fit_options, fit_arguments
from megatron_opt.study.dataset import from_store
from megatron_opt.study.display import print_summary
from megatron_opt.study.report import write_report
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store


def main(argv: list[str], prog: str) -> int:
    """Write the report of the runs that a store has."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("--to", type=Path, help="folder of the report (default: OUTPUT/report)")
    add_fit_options(parser)
    options = parser.parse_args(argv)
    with Store(options.output / STORE_NAME) as store:
        dataset = from_store(store).without(options.without)
        analysis = analyse_if_possible(dataset, **fit_arguments(options, dataset))
        page = write_report(dataset, options.to or options.output / "report", analysis)
    console = make_console()
    print_summary(console, dataset)
    console.print(f"report: {page}", soft_wrap=True, markup=False)
    return 0
