#!/usr/bin/env python3
"""From a rank's death to the first new step: two ranks under the launcher, one killed (-9), by what the time goes into."""

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

from tests.cluster.harness import LAYOUTS, Run, job_flags

PHASES = (
    ("agent", "the agent notices, ends the other rank and starts two new ones"),
    ("imports", "interpreter, torch, Megatron, flags"),
    ("groups", "process groups, datasets, model, optimizer"),
    ("load", "checksums and checkpoint"),
    ("step", "the first step"),
)


def once(folder: Path, model: list[str]) -> dict[str, float]:
    """Seconds by phase of one restart."""
    run = Run(folder, [*job_flags(folder, 4000, interval=10), *LAYOUTS["DP2"], "--optimizer", "adamw", *model])
    run.start()
    try:
        run.until(lambda: run.iteration() >= 25, 150, "25 steps")
        victim, killed = run.ranks()[1], time.time()
        old = set(run.ranks())
        os.kill(victim, signal.SIGKILL)
        run.until(lambda: set(run.ranks()) - old, 60, "new ranks")
        born = time.time()
        lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
        run.until(lambda: (folder / "metrics.jsonl").read_bytes().count(b"\n") > lines, 120, "a new step")
        stepped = time.time()
    finally:
        run.end()
    started = next(e["time"] for e in run.events("restart"))
    (resumed,) = run.events("resume")[-1:]
    loading = resumed["time"] - resumed["seconds"]
    moments = [killed, born, started, loading, resumed["time"], stepped]
    return {name: b - a for (name, _), a, b in zip(PHASES, moments, moments[1:], strict=False)} | {"all": stepped - killed}


def main() -> int:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", nargs=argparse.REMAINDER, default=["--hidden-size", "320", "--num-layers", "8"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = [once(Path(name) / str(number), args.model) for number in range(args.runs)]
    print("| phase | seconds |\n|---|---|")
    for phase, what in (*PHASES, ("all", "death to the first new step")):
        print(f"| {what} | {statistics.median(one[phase] for one in found):.1f} |")
    print(json.dumps([{k: round(v, 2) for k, v in one.items()} for one in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
