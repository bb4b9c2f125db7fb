"""One setup of a speedrun protocol on several seeds: `[torchrun …] train.py PROTOCOL SETUP RUNS [--seeds N]`.

The model, data and batch of the optimizer track of modded-nanogpt, in sizes that the protocol file gives, trained by
`megatron_opt.torch.Optimizer`. Leaves RUNS/SETUP/SEED/metrics.jsonl, which `megatron-opt study speedrun PROTOCOL RUNS` reads.
"""

import argparse
import glob
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_opt.study.commands.speedrun import read_protocol
from megatron_opt.torch import Optimizer

RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else 0)
DEVICE = DEVICE if torch.cuda.is_available() else torch.device("cpu")


# The model: pre-norm, rotary on half of a head, queries and keys normalized, ReLU², biases, a soft cap on logits


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gain.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (rotated(F.rms_norm(part, (self.head,)), *turn) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.12)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def rotations(length: int, head: int) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head/2): a quarter of the head's size turns, from once a token to once in 1024; the rest stands."""
    speeds = torch.cat([1024 ** -torch.linspace(0, 1, head // 4), torch.zeros(head // 4)])
    angles = torch.arange(length)[:, None] * speeds
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = Norm(width), Attention(width, head), Norm(width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), turn)
        return x + self.proj(self.fc(self.norm2(x)).relu().square())


class Model(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.embed, self.first_norm = nn.Embedding(vocabulary, width), Norm(width)
        self.blocks = nn.ModuleList(Block(width, head) for _ in range(layers))
        self.last_norm, self.output = Norm(width), nn.Linear(width, vocabulary)
        for name, weight in self.named_parameters():  # as torch's layers, but projections, logits and biases at zero
            if name.endswith(("proj.weight", "output.weight", "bias")):
                nn.init.zeros_(weight)
            elif weight.ndim == 2 and "embed" not in name:
                nn.init.normal_(weight, std=(3 * weight.shape[1]) ** -0.5)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of all tokens."""
        turn = rotations(tokens.shape[1], self.head)
        x = self.first_norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x, turn)
        logits = self.output(self.last_norm(x)).float()
        capped = 15 * logits / (logits.square() + 225).sqrt()
        return F.cross_entropy(capped.flatten(0, 1), targets.flatten(), reduction="sum")


# The data: files of two-byte tokens, one after another, with or without a header of 256 four-byte words


def shard(path: str) -> np.ndarray:
    header = np.fromfile(path, dtype=np.int32, count=1)
    return np.memmap(path, dtype=np.uint16, mode="r", offset=1024 if header[0] == 20240520 else 0)


def batches(pattern: str, tokens: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of batch after batch of `tokens` tokens."""
    files = sorted(glob.glob(os.path.expandvars(pattern)))
    if not files:
        raise SystemExit(f"{pattern} names no file; see README.md for the data.")
    share = tokens // RANKS
    while True:
        for path in files:
            data = shard(path)
            for first in range(0, len(data) - tokens, tokens):
                here = torch.from_numpy(data[first + RANK * share :][: share + 1].astype(np.int64)).to(DEVICE)
                yield here[:-1].view(-1, length), here[1:].view(-1, length)


def mean(total: Tensor, tokens: int) -> float:
    if RANKS > 1:
        dist.all_reduce(total)
    return float(total) / tokens


def run(protocol: dict[str, Any], setup: dict[str, Any], seed: int, folder: Path) -> None:
    """Train once; a line for each evaluation."""
    torch.manual_seed(seed)
    length, tokens, steps = protocol["sequence_length"], protocol["batch_tokens"], setup["steps"]
    plain: nn.Module = Model(**protocol["model"]).to(DEVICE)
    model = nn.parallel.DistributedDataParallel(plain) if RANKS > 1 else plain
    optimizer = Optimizer(model, groups=setup["groups"], lr=setup["lr"], weight_decay=0.0)
    warmup, cooldown = setup.get("warmup", 1), setup.get("cooldown", 0.7)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, (1 - step / steps) / cooldown)
    )
    train = batches(protocol["train"], tokens, length)  # the same for every seed: the initialization differs
    valid = [next(batches(protocol["valid"], protocol["valid_tokens"], length))]
    folder.mkdir(parents=True, exist_ok=True)
    micro, began, seconds = protocol["micro_sequences"], time.perf_counter(), 0.0
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=protocol.get("bf16", True))
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(steps + 1):
            often = protocol["evaluate"]["late"] if step >= 0.9 * steps else protocol["evaluate"]["every"]
            if step == steps or step % often == 0:
                seconds += time.perf_counter() - began
                with torch.no_grad(), autocast:
                    parts = (pair for x, y in valid for pair in zip(x.split(micro), y.split(micro)))
                    loss = mean(sum(model(x, y) for x, y in parts), protocol["valid_tokens"])  # type: ignore[arg-type]
                row = {
                    "kind": "eval",
                    "iteration": step,
                    "tokens": step * tokens,
                    "loss": loss,
                    "train_time_s": seconds,
                }
                if RANK == 0:
                    print(json.dumps(row), file=log, flush=True)
                began = time.perf_counter()
            if step == steps:
                break
            x, y = next(train)
            for part, targets in zip(x.split(micro), y.split(micro)):
                with autocast:
                    loss_sum = model(part, targets) * RANKS  # ranks are averaged, tokens summed
                loss_sum.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    if RANK == 0:
        print(f"{folder}: {loss:.4f} after {steps} steps, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("setup")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, default=1, help="runs with the seeds 0 … N − 1 (1)")
    args = parser.parse_args()
    protocol = read_protocol(args.protocol)
    if args.setup not in protocol["setups"]:
        parser.error(f"{args.setup} is none of {', '.join(protocol['setups'])}")
    if RANKS > 1:
        dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    for seed in range(args.seeds):
        run(protocol, protocol["setups"][args.setup], seed, args.runs / args.setup / str(seed))
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
