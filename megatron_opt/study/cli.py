"""`megatron-opt study COMMAND`: plan, run, watch, report."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "plan": ("planning.main", "say what a study would run, and how long it takes, without starting anything"),
    "run": ("running.main", "run or resume a study and write its report"),
    "status": ("watching.main", "show the runs of a study, live"),
    "report": ("reporting.main", "write the report of a study again"),
    "fit": ("fitting.main", "fit scaling laws to the runs and extrapolate"),
    "findings": ("findings.main", "say which findings of arXiv 2507.08472 hold in a study, as a page in Markdown"),
    "predict": ("predicting.main", "write predictions of large runs to a dated file, before they are made"),
    "next": ("predicting.rank", "rank further runs by how much each narrows the predicted gain per GPU-hour"),
    "verify": ("verifying.main", "score registered predictions, or put held-out ones beside the outcome"),
    "speedrun": ("speedrun.main", "steps to a target loss with its significance, beside published results"),
    "export": ("exchanging.export", "write the runs as CSV or Parquet"),
    "import": ("exchanging.import_", "add runs from CSV, Parquet, JSON, TensorBoard folders or logs of other programs"),
    "init": ("starting.main", "write a study file to start from"),
    "demo-paper": ("fitting.demo_paper", "fit and report the published study without training"),
}


def main(argv: list[str], prog: str) -> int:
    """Run one study command; raises UserError for bad input."""
    what = "Plan, tune, run, fit and report a comparison of optimizers."
    parser = argparse.ArgumentParser(prog=prog, description=what)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, description=what, add_help=False)
    known = parser.parse_args(argv[:1])
    module, function = COMMANDS[known.command][0].split(".")
    command = getattr(importlib.import_module(f"megatron_opt.study.commands.{module}"), function)
    return command(argv[1:], f"{prog} {known.command}")
