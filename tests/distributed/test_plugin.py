"""A script of Megatron-LM's own structure trains with our optimizers after one import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opt.training.arguments import CPU_FLAGS
from tests.distributed import cases as c
from tests.distributed.pool import ROOT, write_dataset


@pytest.mark.parametrize("optimizer", ["soap", "muon"])
def test_stock_script_trains_with_ours(tmp_path: Path, optimizer: str) -> None:
    data = write_dataset(tmp_path / "text")
    at = c.COMMON.index("--hang-timeout")  # a flag of our own entry
    ours = c.COMMON[:at] + c.COMMON[at + 2 :]
    flags = [
        *CPU_FLAGS,
        *ours,
        *c.DENSE,
        "--optimizer",
        optimizer,
        "--train-data-path",
        data,
        "--data-cache-path",
        str(tmp_path / "cache"),
        "--train-iters",
        "16",
        "--log-interval",
        "1",
        "--tensor-model-parallel-size",
        "2",
        "--max-position-embeddings",
        "16",
        "--lr-decay-iters",
        "16",
        "--eval-iters",
        "0",
        *(["--qk-clip", "--qk-clip-threshold", "0.9"] if optimizer == "muon" else []),  # in place of Megatron's own
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.distributed.stock_script",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(rf"^{optimizer} +(hidden|embedding)", done.stdout, re.MULTILINE), "our table of groups"
    losses = [float(found) for found in re.findall(r"lm loss: ([0-9.E+-]+)", done.stdout)]
    assert len(losses) == 16
    assert losses[-1] < losses[0]
