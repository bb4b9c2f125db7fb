"""What SOAP's floor under √v costs in loss; and what the filling of a rank-deficient eigenbasis does, with the study's rule.

A two-layer byte-level transformer (64 wide, 256 feed-forward) on the sources of Python's standard library; SOAP on all
parameters, blocks off, so that every rectangle's long side starts rank-deficient.

    python benchmarks/soap_null_space.py [--steps 300] [--seeds 3] [--frequency 10] [--fillings]
"""

import argparse
import statistics
import sysconfig
from pathlib import Path

import torch
from torch import nn

from megatron_opt.kernels import eigenbasis
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

WIDTH, LENGTH, BATCH = 64, 128, 16
ours = eigenbasis.complete


def rounding(columns, noise=None):
    """The basis as QR leaves it: null-space columns are rounding, blown up to length 1."""
    size = columns.shape[-1]
    if size < columns.shape[-2]:
        columns = torch.nn.functional.pad(columns, (0, columns.shape[-2] - size))
        columns = columns + 1e-16 * torch.randn_like(columns) * columns.abs().amax((-2, -1), keepdim=True)
    return torch.linalg.qr(columns)[0]


def rotated(columns, noise=None):
    """Ours, with the null space turned by a random rotation."""
    basis, rank = ours(columns, noise), columns.shape[-1]
    left = basis.shape[-1] - rank
    if left > 1:
        turn = torch.linalg.qr(torch.randn(left, left, dtype=basis.dtype))[0]
        basis = torch.cat([basis[..., :rank], basis[..., rank:] @ turn], -1)
    return basis


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)])
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        h = self.norms[0](x)
        q, k, v = (layer(h).unflatten(-1, (4, -1)).transpose(1, 2) for layer in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.up(self.norms[1](x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))


def corpus():
    """Bytes of the standard library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def batch(text, generator):
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


def train(text, seed, steps, frequency, options, lr=0.003):
    """Mean loss on 20 held-out batches after `steps` steps."""
    torch.manual_seed(seed)
    model, generator = Model(), torch.Generator().manual_seed(seed)
    optimizer = registry.build("soap", dict(block_size=0, precondition_frequency=frequency, **options))
    params = dict(model.named_parameters())
    infos = [MatrixInfo(name, tuple(p.shape)) for name, p in params.items()]
    states = [optimizer.init_state(p.data, info) for p, info in zip(params.values(), infos)]
    for step in range(1, steps + 1):
        inputs, targets = batch(text, generator)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        grads = torch.autograd.grad(loss, list(params.values()))
        rate = lr * min(1.0, step / 20) * (1 - step / (steps + 1))
        for p, u in zip(params.values(), optimizer.update([g.clone() for g in grads], states, step, infos)):
            p.data.add_(u, alpha=-rate)
    held_out = torch.Generator().manual_seed(12345)
    with torch.no_grad():
        losses = []
        for _ in range(20):
            inputs, targets = batch(text, held_out)
            losses.append(float(nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())))
    return statistics.mean(losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--floors", type=float, nargs="+", default=[0.0, 0.01, 0.1, 0.3])
    parser.add_argument("--fillings", action="store_true", help="other fillings of null spaces too")
    args = parser.parse_args()
    text = corpus()
    print(f"{'':<12} " + " ".join(f"seed {seed:<5}" for seed in range(args.seeds)) + "  mean")
    rows = [(f"floor {floor:g}", ours, dict(floor=floor)) for floor in args.floors]
    rows += [("rounding", rounding, dict(floor=0)), ("rotated", rotated, dict(floor=0))] if args.fillings else []
    for name, fill, options in rows:
        eigenbasis.complete = fill
        losses = [train(text, seed, args.steps, args.frequency, options) for seed in range(args.seeds)]
        print(
            f"{name:<12} " + " ".join(f"{loss:.4f}    " for loss in losses) + f"  {statistics.mean(losses):.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
