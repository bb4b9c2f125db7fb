#!/usr/bin/env python3
"""What a checkpoint costs a step: synchronous and asynchronous saves of a model of 10 million parameters, AdamW."""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.cluster.harness import Run, job_flags

MODEL = ("--hidden-size", "320", "--num-layers", "8", "--optimizer", "adamw")


def stalls(folder: Path, *more: str) -> list[float]:
    """Seconds for which each save but the first held training up."""
    run = Run(folder, [*job_flags(folder, 48, interval=8), *MODEL, *more], launcher=("--nproc-per-node", "1"))
    if run.finish(900) != 0:
        raise SystemExit(run.tail())
    started = {entry["iteration"]: entry["stall_seconds"] for entry in run.events("save_started")}
    saved = {entry["iteration"]: entry["seconds"] for entry in run.events("save")}
    return [started.get(iteration, seconds) for iteration, seconds in sorted(saved.items())][1:]


def main() -> int:
    """Print both medians and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        both = stalls(Path(name) / "sync")
        background = stalls(Path(name) / "async", "--async-save", "--async-strategy", "mcore")
    sync, in_background = statistics.median(both), statistics.median(background)
    print(json.dumps({"sync_s": sync, "async_stall_s": in_background, "ratio": round(in_background / sync, 3),
                      "sync": both, "async": background}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
