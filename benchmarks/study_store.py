"""Claim: with 10,000 runs in the store, `study status`, `fit` and `report` answer in seconds.

Fills a store with synthetic runs and curves in a temporary folder, then times each command as a user starts
it:

    python benchmarks/study_store.py [--runs 10000] [--points 200]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_opt.study import curves
from megatron_opt.study.store import Store

SIZES = {"s": 1_000_000, "m": 3_000_000, "l": 10_000_000, "xl": 30_000_000}
OPTIMIZERS = {"adamw": 1.0, "muon": 1.3, "soap": 1.25, "kron": 1.15}
RATIOS = (1.0, 2.0, 4.0, 8.0)


def loss_of(optimizer: str, n: int, ratio: float, lr: float, beta: float, noise: random.Random) -> float:
    """A coupled law plus bowls around the best learning rate and momentum."""
    law = 1.8 + 18 * n**-0.25 + 30 * (OPTIMIZERS[optimizer] * 20 * ratio * n) ** -0.3
    return law + 0.02 * math.log2(lr / 0.008) ** 2 + (beta - 0.9) ** 2 + noise.gauss(0, 1e-3)


def fill(store: Store, count: int, points: int) -> None:
    """`count` finished runs, each with a curve of `points` training points."""
    noise, rows, blobs = random.Random(0), [], {}
    cells = [(o, m, r) for o in OPTIMIZERS for m in SIZES for r in RATIOS]
    base = {
        "train": [
            {"kind": "train", "iteration": i, "tokens": 100 * i, "loss": 9 * i**-0.2, "lr": 0.01}
            for i in range(1, points + 1)
        ],
        "valid": [
            {"kind": "eval", "iteration": i, "tokens": 100 * i, "loss": 9 * i**-0.2}
            for i in range(points // 10, points + 1, points // 10)
        ],
    }
    blob = curves.to_parquet(curves.Curve(**base))
    for i in range(count):
        optimizer, model, ratio = cells[i % len(cells)]
        step = i // len(cells)
        lr, beta = 0.001 * 2 ** (step % 6), 0.8 + 0.01 * (step // 6)
        n = SIZES[model]
        loss = None if lr > 0.03 else loss_of(optimizer, n, ratio, lr, beta, noise)
        results = {
            "diverged": loss is None,
            "final_valid_loss": loss,
            "wall_time_s": 60.0,
            "train_time_s": 55.0,
            "tokens_per_s": 1e4,
            "step_time_s": {"total": 0.1, "optimizer": 0.01},
            "peak_memory_bytes": 10**8,
        }
        rows.append(
            {
                "id": f"{i:016x}",
                "optimizer": optimizer,
                "model": model,
                "ratio": ratio,
                "seed": 1,
                "hyper": json.dumps({"lr": lr, "beta1": beta, "batch_size": 16}),
                "config": '{"flags": {}}',
                "arguments": "[]",
                "parameters": n,
                "tokens": int(20 * ratio * n),
                "status": "diverged" if loss is None else "completed",
                "attempts": 1,
                "interruptions": 0,
                "created": float(i),
                "started": float(i),
                "finished": float(i + 1),
                "loss": loss,
                "results": json.dumps(results),
                "reason": None,
                "phases": ["grid"],
            }
        )
        blobs[rows[-1]["id"]] = blob
    store.import_runs(rows, blobs)
    store.set_meta("baseline", "adamw")


def main() -> None:
    """Print one table: command, wall-clock seconds, seconds of processor time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--points", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.sqlite"
        start = time.perf_counter()
        with Store(path, create=True) as store:
            fill(store, options.runs, options.points)
        seconds = [("fill", time.perf_counter() - start, time.process_time())]
        for command in ("status", "fit", "report"):
            start, before = time.perf_counter(), os.times().children_user
            subprocess.run(
                [sys.executable, "-m", "megatron_opt.cli", "study", command, folder],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds.append((command, time.perf_counter() - start, os.times().children_user - before))
        print(
            f"{options.runs} runs, {path.stat().st_size / 1e6:.0f} MB, page "
            f"{(Path(folder) / 'report' / 'index.html').stat().st_size / 1e6:.2f} MB"
        )
        print("command    wall s   user s")
        for command, wall, user in seconds:
            print(f"{command:8} {wall:8.2f} {user:8.2f}")


if __name__ == "__main__":
    main()
