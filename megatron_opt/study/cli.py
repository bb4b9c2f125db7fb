"""`megatron-opt study COMMAND`: plan, run, watch, report."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "plan": ("planning", "say what a study would run, and how long it takes, without starting anything"),
    "run": ("running", "run or resume a study and write its report"),
    "status": ("watching", "show the runs of a study, live"),
    "report": ("reporting", "write the report of a study again"),
}


def main(argv: list[str], prog: str) -> int:
    """Run one study command; raises UserError for bad input."""
    what = "Plan, tune, run, fit and report a comparison of optimizers."
    parser = argparse.ArgumentParser(prog=prog, description=what)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, description=what, add_help=False)
    known = parser.parse_args(argv[:1])
    module = importlib.import_module(f"megatron_opt.study.commands.{COMMANDS[known.command][0]}")
    return module.main(argv[1:], f"{prog} {known.command}")
