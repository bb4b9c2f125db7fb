#!/usr/bin/env python3
"""What a checkpoint costs training: synchronous saves against background ones, 10 million parameters, AdamW.

A stall is the time for which the loop stands still: the save itself, and its completion at later steps. The first save of
a run, which plans, is a column of its own; the others give medians.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cluster.harness import LAYOUTS, Run, job_flags

MODEL = ("--hidden-size", "320", "--num-layers", "8", "--optimizer", "adamw")


def measure(folder: Path, ranks: int, saves: int, every: int, *more: str) -> tuple[list[float], list[float]]:
    """(stall, seconds until published) of each save of a run."""
    layout = LAYOUTS["DP2"] if ranks > 1 else ()
    flags = [*job_flags(folder, saves * every, interval=every), *MODEL, *layout, *more]
    run = Run(folder, flags, launcher=("--nproc-per-node", str(ranks)))
    if run.finish(170) != 0:
        raise SystemExit(run.tail())
    entries = run.events("save")[:-1]  # the last one is waited for: the run ends
    return [e.get("stall_seconds", e["seconds"]) for e in entries], [e["seconds"] for e in entries]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--every", type=int, default=10, metavar="STEPS")
    args = parser.parse_args()
    print("| ranks | synchronous save, ms | background: stall, ms | first | until published | stall / synchronous |")
    print("|---|---|---|---|---|---|")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as name:
            both, _ = measure(Path(name) / "sync", ranks, args.saves, args.every)
            stalls, whole = measure(Path(name) / "async", ranks, args.saves, args.every, "--async-save")
        sync, stall = 1e3 * statistics.median(both[1:]), 1e3 * statistics.median(stalls[1:])
        print(
            f"| {ranks} | {sync:.0f} | {stall:.1f} | {1e3 * stalls[0]:.0f} | {1e3 * statistics.median(whole[1:]):.0f} | "
            f"{100 * stall / sync:.1f}% |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
