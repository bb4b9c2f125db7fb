"""What the best runs of a study say after a prompt: `megatron-opt generate` on their last checkpoints, kept in the store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megatron_opt.study.dataset import Dataset
from megatron_opt.study.executors.base import last_line
from megatron_opt.study.store import Store

GENERATE = ("-m", "megatron_opt.cli", "generate")
DRAWN = ("--max-new-tokens", "48", "--temperature", "0.8", "--top-p", "0.95", "--seed", "1")
SAMPLES = "samples"
"""of a store: run → its text"""


def take(store: Store, dataset: Dataset, prompt: str, runs: Path) -> list[str]:
    """Ask each optimizer's best run of the last regime that has one; returns what could not be sampled, a line each."""
    kept, wrong = store.meta(SAMPLES, {}), []
    for name in dataset.optimizers:
        cells = [dataset.best()[name, regime] for regime in dataset.regimes if (name, regime) in dataset.best()]
        run = cells[-1].record.id if cells else ""
        checkpoints = runs / run / "checkpoints"
        if not run or run in kept or not checkpoints.is_dir():
            continue
        words = [sys.executable, *GENERATE, str(checkpoints), "--prompt", prompt, *DRAWN]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            wrong.append(f"no sample of run {run}, {name}: {last_line(done.stderr)}")
        else:
            kept[run] = done.stdout.strip()
    store.set_meta(SAMPLES, kept)
    return wrong
