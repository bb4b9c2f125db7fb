"""Tokens per second of training: the whole job (`megatron_opt.pretrain`) against a plain PyTorch loop.

The same Llama, batch, AdamW and precision, one process and one thread each, in turn; medians over log intervals.
usage: python benchmarks/train_throughput.py [--steps 40] [--repeats 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {  # layers, hidden, ffn, heads, sequence, batch
    "1M": (4, 128, 384, 4, 256, 8),
    "10M": (8, 320, 896, 5, 256, 4),
}
VOCABULARY = 2048
INTERVAL = 10


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (b, heads, s, d)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    """One pre-norm Llama layer: attention, then SwiGLU."""

    def __init__(self, hidden: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).reshape(b, s, h))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """What a newcomer would write."""

    def __init__(self, layers: int, hidden: int, ffn: int, heads: int, sequence: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(Block(hidden, ffn, heads) for _ in range(layers))
        self.norm, self.output = nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, VOCABULARY, bias=False)
        d = hidden // heads
        angles = torch.outer(torch.arange(sequence), 10000.0 ** (-torch.arange(0, d, 2) / d))
        self.cos, self.sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), labels.flatten())


def plain(name: str, steps: int) -> None:
    """Train the plain model; prints seconds per step, one a line, for every ten steps after the first ten."""
    layers, hidden, ffn, heads, sequence, batch = SIZES[name]
    model = Llama(layers, hidden, ffn, heads, sequence)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    began = time.perf_counter()
    for number in range(1, steps + 1):
        tokens = torch.randint(0, VOCABULARY, (batch, sequence + 1))
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number % INTERVAL == 0:
            loss.item()
            now = time.perf_counter()
            if number > INTERVAL:
                print((now - began) / INTERVAL)
            began = now


def plain_seconds(name: str, steps: int) -> list[float]:
    """Seconds per step of a plain run in a process of its own."""
    command = [sys.executable, __file__, "--plain", name, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in done.stdout.split()]


def our_seconds(name: str, steps: int) -> list[float]:
    """Seconds per step of the job, from its metrics.jsonl."""
    layers, hidden, ffn, heads, sequence, batch = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        flags = f"""--preset llama --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn}
            --num-attention-heads {heads} --seq-length {sequence} --micro-batch-size {batch}
            --global-batch-size {batch} --train-iters {steps} --lr 1e-3 --optimizer adamw --mock-data
            --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --eval-iters 0 --eval-interval 1000000
            --log-interval {INTERVAL} --output-dir {folder}"""
        subprocess.run([sys.executable, "-m", "megatron_opt.pretrain", *flags.split()], capture_output=True, check=True)
        entries = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [entry["step_time"] for entry in entries if entry["kind"] == "train"][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", metavar="SIZE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.plain:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return plain(options.plain, options.steps)
    print(f"{'size':>5} {'parameters':>11} {'ours tok/s':>11} {'plain tok/s':>12} {'ratio':>6}")
    for name, shape in SIZES.items():
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(options.repeats):
            seconds["ours"] += our_seconds(name, options.steps)
            seconds["plain"] += plain_seconds(name, options.steps)
        tokens = shape[4] * shape[5]
        ours, peer = (tokens / statistics.median(seconds[key]) for key in ("ours", "plain"))
        count = sum(p.numel() for p in Llama(*shape[:5]).parameters())
        print(f"{name:>5} {count:>11,} {ours:>11,.0f} {peer:>12,.0f} {ours / peer:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
