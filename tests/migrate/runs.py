"""Small runs for the tests of conversions: flags, launching, reading checkpoints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

FLAGS = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --untie-embeddings-and-output-weights --seq-length "
    "16 --micro-batch-size 2 --global-batch-size 8 --train-iters 16 --lr 3e-3 --lr-decay-style constant "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 32 --eval-interval 1000 "
    "--eval-iters 0 --log-interval 1 --hidden-dropout 0 --attention-dropout 0 --position-embedding-type rope "
    "--swiglu --normalization RMSNorm --disable-bias-linear --mock-data --megatron-log "
).split()
ADAM = ["--adam-beta1", "0.9", "--adam-beta2", "0.95", "--adam-eps", "1e-8"]
STOP = 8


def launch(module: str, ranks: int, flags: list[str], folder: Path) -> str:
    """What one run prints; it must end well."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    words = [*command, module, *FLAGS, "--data-cache-path", str(folder / "cache"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def convert(folder: Path, source: str, target: str, ranks: int, *flags: str) -> str:
    """A warm start in folder/target from folder/source."""
    words = ["--load", str(folder / source), "--save", str(folder / target), "--ckpt-step", str(STOP), *flags]
    return launch("megatron_opt.migrate.checkpoint", ranks, words, folder)


def losses(output: str) -> dict[int, float]:
    """Iteration → loss from a run's output."""
    found = re.findall(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)", output)
    return {int(number): float(value) for number, value in found}


def tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """Whole tensors of a torch_dist checkpoint whose names contain `part`."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(folder / f"iter_{STOP:07d}")
    metadata = reader.read_metadata().state_dict_metadata
    found: dict = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in metadata.items()
        if part in key and hasattr(item, "size")
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors."""
    every = tensors(folder, "")
    return {key: value for key, value in every.items() if not key.startswith(("optimizer", "rng", "rerun"))}
