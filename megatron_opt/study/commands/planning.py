"""`study plan`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from megatron_opt.study.commands.checking import check_study
from megatron_opt.study.display import make_console, print_table
from megatron_opt.study.executors.local import LocalExecutor
from megatron_opt.study.planning import plan_costs
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study


def main(argv: list[str], prog: str) -> int:
    """Print runs, FLOPs, tokens and expected hours of each phase."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("study", type=Path, help="study file (YAML)")
    parser.add_argument("--output", type=Path, help="folder of earlier runs, whose measured speed gives the hours")
    options = parser.parse_args(argv)
    study = read_study(options.study)
    check_study(study)
    records = []
    if options.output is not None and (options.output / STORE_NAME).is_file():
        with Store(options.output / STORE_NAME) as store:
            records = store.runs(status="completed")
    costs = plan_costs(study, records)
    console = make_console()
    rows = [[c.phase, c.optimizer, *_cells(c.least, c.most, c.tokens, c.flops, c.hours)] for c in costs]
    hours = [c.hours for c in costs if c.hours is not None]
    least, most = sum(c.least for c in costs), sum(c.most for c in costs)
    tokens, flops = math.fsum(c.tokens for c in costs), math.fsum(c.flops for c in costs)
    rows.append(["total", "", *_cells(least, most, tokens, flops, math.fsum(hours) if hours else None)])
    print_table(
        console,
        ["phase", "optimizer", "runs", "tokens", "FLOPs", "hours"],
        rows,
        f"{study.name}: {len(study.models)} models, {len(study.regimes())} regimes, baseline {study.baseline}",
    )
    if not hours:
        console.print("Hours are unknown until a run has finished (`--output`) or `executor: flops_per_s:` is given.")
        return 0
    slots = study.executor.jobs or (LocalExecutor(study.executor).slots if study.executor.kind == "local" else 1)
    total = sum(hours)
    console.print(f"At most {total:.2f} hours of runs, about {total / slots:.2f} hours with {slots} at once.")
    if study.max_hours is not None and total * study.executor.ranks > study.max_hours:
        console.print(f"This may exceed the budget of {study.max_hours:g} hours, at which no further run is started.")
    return 0


def _cells(least: int, most: int, tokens: float, flops: float, hours: float | None) -> list[str]:
    runs = str(most) if least == most else f"{least} to {most}"
    return [runs, f"{tokens:.3g}", f"{flops:.3g}", "unknown" if hours is None else f"{hours:.2f}"]
