#!/usr/bin/env python3
"""From a rank's death to the first new step: ranks under the launcher, one killed (-9), by what the time goes into."""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_opt import run_files
from tests.cluster.harness import LAYOUTS, Run, job_flags

PHASES = (
    ("agent", "the agent notices, ends the other ranks and starts new ones"),
    ("imports", "interpreter, torch, Megatron, flags"),
    ("groups", "process groups, datasets, model, optimizer"),
    ("load", "checksums and checkpoint"),
    ("step", "the first step"),
)


def once(folder: Path, ranks: int, model: list[str]) -> dict[str, float]:
    """Seconds by phase of one restart."""
    flags = [*job_flags(folder, 4000, interval=10), *LAYOUTS["DP2"], "--optimizer", "adamw", *model]
    run = Run(folder, flags, launcher=("--nproc-per-node", str(ranks), "--max-restarts", "1"))
    run.start()
    try:
        run.until(lambda: run.iteration() >= 25, 150, "25 steps")
        victim, killed = run.ranks()[-1], time.time()
        old = set(run.ranks())
        os.kill(victim, signal.SIGKILL)
        run.until(lambda: set(run.ranks()) - old, 60, "new ranks")
        born = time.time()
        log = folder / run_files.METRICS
        run.until(lambda: any(row["time"] > born for row in run_files.metrics(log)), 120, "a new step")
        stepped = time.time()
    finally:
        run.end()
    started = next(e["time"] for e in run.events("restart"))
    (resumed,) = run.events("resume")[-1:]
    loading = resumed["time"] - resumed["seconds"]
    moments = [killed, born, started, loading, resumed["time"], stepped]
    return {name: b - a for (name, _), a, b in zip(PHASES, moments, moments[1:], strict=False)} | {
        "all": stepped - killed
    }


def main() -> int:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="a column each (default 1 2)")
    parser.add_argument("--runs", type=int, default=3, help="restarts of which the median is taken (default 3)")
    parser.add_argument("--model", nargs=argparse.REMAINDER, default=["--hidden-size", "320", "--num-layers", "8"])
    args = parser.parse_args()
    results: dict[int, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for ranks in args.ranks:
            folders = [Path(name) / f"{ranks}-{number}" for number in range(args.runs)]
            results[ranks] = [once(folder, ranks, args.model) for folder in folders]
    print(f"| phase | {' | '.join(f'{n} rank{"s" * (n > 1)}, s' for n in results)} |\n|---|{'---|' * len(results)}")
    for phase, what in (*PHASES, ("all", "death to the first new step")):
        medians = (statistics.median(one[phase] for one in runs) for runs in results.values())
        print(f"| {what} | {' | '.join(f'{value:.1f}' for value in medians)} |")
    print(json.dumps({n: [{k: round(v, 2) for k, v in one.items()} for one in runs] for n, runs in results.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
