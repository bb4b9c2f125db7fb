"""Time of one optimizer step, ours and the peers', on the same gradients in one process: one table.

    python benchmarks/optimizer_step.py [--families elementwise muon soap kron] [--rules adamw …]
        [--cases model small large] [--threads 1] [--share] [--device cuda] [--json FILE]

Contenders take turns; a figure is the median over rounds of processor time (threads = 1) or wall time. SOAP and Kron get
another gradient each step: their factors of one gradient alone would be degenerate. The bound is what the step's bytes take
at the bandwidth that our AdamW reaches on `model`, plus what its matrix products take at the rate of a 1024-cube product in
the same type. `--share` measures our rules alone.

On a GPU (`--device cuda`) times are those between two CUDA events, every contender gets another of three sets of gradients each
step, so that no step finds the last one's in cache, and the ceilings are a copy of a GiB and products of 8192 cubed.
"""

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opt.kernels import multi_tensor, products
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import ElementwiseOptimizer, MatrixInfo

LAYER = [(512, 512)] * 4 + [(1408, 512)] * 2 + [(512, 1408)]
CASES = {
    "model": LAYER * 8,  # 25.7M parameters: hidden 512, FFN 1408, 8 layers
    "layer": LAYER,
    "small": [(64, 64)] * 400,
    "large": [(1024, 4096)] * 4,
    "ten": ([(320, 320)] * 4 + [(896, 320)] * 2 + [(320, 896)]) * 8,  # 10.2M parameters
}
for _name, _hidden, _ffn, _layers in (("130m", 512, 2048, 32), ("300m", 768, 3072, 32), ("1b", 2048, 5504, 24)):
    CASES[_name] = ([(_hidden, _hidden)] * 4 + [(_ffn, _hidden)] * 2 + [(_hidden, _ffn)]) * _layers
CASES["tiny"] = [(32, 32), (48, 32)]
DEVICE = torch.device("cpu")  # set by --device
LR, WD = 1e-3, 0.1
FAMILIES = {
    "elementwise": ["adamw", "nadamw", "mars", "cautious", "lion", "signum", "sophia", "adam_mini"],
    "muon": ["muon"],
    "soap": ["soap"],
    "kron": ["kron"],
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"muon_fp32": ("muon", {"fp32_matmul_prec": "high"})}  # for --rules
FRESH = ("soap", "kron")  # rules whose time depends on how gradients differ
PERIOD = {"soap": 10}  # steps of a turn: a refresh is among them


class Peer:
    """An optimizer of torch's interface; its gradients are put back, as some take them away."""

    def __init__(self, optimizer: Any, params: list[torch.nn.Parameter]) -> None:
        self.optimizer, self.params, self.grads = optimizer, params, [p.grad for p in params]

    def step(self) -> None:
        for p, g in zip(self.params, self.grads):
            p.grad = g
        self.optimizer.step()


def _random(shapes: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """The same numbers every time."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=DEVICE) for shape in shapes]


class Gradients:
    """A few sets of gradients, put into a contender's own tensors between its steps."""

    def __init__(self, shapes: list[tuple[int, int]], count: int) -> None:
        self.sets = [_random(shapes, 1 + which) for which in range(count)]
        self.next = 0

    def renew(self, grads: list[Tensor]) -> None:
        if self.sets:
            torch._foreach_copy_(grads, self.sets[self.next % len(self.sets)])
            self.next += 1


class Ours:
    """Our rule with the parameter update it ends in, as the engine runs it on one process."""

    def __init__(self, name: str, params: list[Tensor], grads: list[Tensor]) -> None:
        self.params, self.grads, self.number = params, grads, 0
        self.optimizer = registry.build(*VARIANTS.get(name, (name, {})))
        self.elementwise = isinstance(self.optimizer, ElementwiseOptimizer)
        self.infos = [MatrixInfo(f"w{i}", tuple(p.shape)) for i, p in enumerate(params)]
        if self.elementwise:
            self.states = [self.optimizer.init_state(p) for p in params]
        else:
            self.states = [self.optimizer.init_state(p, info) for p, info in zip(params, self.infos)]

    def step(self) -> None:
        self.number += 1
        if self.elementwise:
            self.optimizer.update(self.params, self.grads, self.states, self.number, LR, WD)
            return
        directions = self.optimizer.update(self.grads, self.states, self.number, self.infos)
        multi_tensor.update(UpdateKind.APPLY, self.params, directions, (), Coefficients(lr=LR, decay_factor=LR * WD))

    def cost(self) -> tuple[float, dict[str, float]]:
        """(bytes, FLOPs by kernel class) of a mean step."""
        if self.elementwise:
            return sum(self.optimizer.cost(p.numel()).elementwise_bytes for p in self.params), {}
        total_bytes, flops = 0.0, dict[str, float]()
        for p, info in zip(self.params, self.infos):
            cost = self.optimizer.cost(info)
            total_bytes += cost.elementwise_bytes + 12.0 * p.numel()
            for kind, amount in cost.flops.items():
                flops[kind] = flops.get(kind, 0.0) + amount
            for kind, amount in cost.refresh.items():
                flops[kind] = flops.get(kind, 0.0) + amount / cost.refresh_every
        return total_bytes, flops


Factory = Callable[[list[torch.nn.Parameter]], Any]


def _of(module: str, name: str, **options: Any) -> Factory:
    def build(params: list[torch.nn.Parameter]) -> Any:
        loaded = importlib.import_module(module)
        if module == "heavyball":
            loaded.utils.compile_mode = None  # its compiled step needs minutes before the first one
        groups: Any = (
            [{"params": params, "use_muon": True}] if (module, name) == ("pytorch_optimizer", "Muon") else params
        )
        return getattr(loaded, name)(groups, lr=LR, weight_decay=WD, **options)

    return build


PEERS: dict[str, dict[str, Factory]] = {
    "adamw": {
        "torch fused": _of("torch.optim", "AdamW", fused=True),
        "torch foreach": _of("torch.optim", "AdamW", foreach=True),
        "heavyball": _of("heavyball", "AdamW"),
    },
    "nadamw": {"torch foreach": _of("torch.optim", "NAdam", foreach=True, decoupled_weight_decay=True)},
    "mars": {"pytorch-optimizer": _of("pytorch_optimizer", "MARS", optimize_1d=True)},
    "cautious": {"heavyball": _of("heavyball", "AdamW", caution=True)},
    "lion": {
        "lion-pytorch": _of("lion_pytorch", "Lion"),
        "pytorch-optimizer": _of("pytorch_optimizer", "Lion"),
    },
    "signum": {"pytorch-optimizer": _of("pytorch_optimizer", "SignSGD")},
    "sophia": {},
    "adam_mini": {},
    "muon": {
        "torch": _of("torch.optim", "Muon"),
        "emerging-optimizers": _of(
            "emerging_optimizers.orthogonalized_optimizers", "Muon", coefficient_type="simple", nesterov=True,
            scale_mode="shape_scaling",
        ),
        "pytorch-optimizer": _of("pytorch_optimizer", "Muon"),
        "heavyball": _of("heavyball", "Muon"),
    },
    "soap": {
        "pytorch-optimizer": _of("pytorch_optimizer", "SOAP"),
        "heavyball": _of("heavyball", "SOAP", precondition_frequency=10, use_precond_schedule=False),
    },
    "kron": {
        "kron-torch": _of("kron_torch", "Kron"),
        "heavyball": _of("heavyball", "PSGDKron"),
    },
}  # fmt: skip


def contenders(optimizer: str, shapes: list[tuple[int, int]], peers: bool = True) -> dict[str, Any]:
    """Ours and the peers that are installed, each with its own parameters and the gradients of all."""
    start, grads = _random(shapes, 0), _random(shapes, 100)

    def parameters() -> list[torch.nn.Parameter]:
        params = [torch.nn.Parameter(p.clone()) for p in start]
        for p, g in zip(params, grads):
            p.grad = g.clone()
        return params

    results: dict[str, Any] = {}
    if optimizer in {*registry.optimizers(), *VARIANTS}:
        results["ours"] = Ours(optimizer, [p.detach() for p in parameters()], [g.clone() for g in grads])
    for name, build in PEERS.get(optimizer, {}).items() if peers else ():
        params = parameters()
        try:
            peer = Peer(build(params), params)
            peer.step()
        except (ImportError, RuntimeError) as error:  # not installed, or out of memory on these shapes
            print(f"{optimizer}: {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        results[name] = peer
    return results


def clock(threads: int) -> float:
    """Processor seconds of one thread are not disturbed by other processes; of several they would add up."""
    return time.process_time() if threads == 1 else time.perf_counter()


def timed(function: Callable[[], Any], threads: int) -> float:
    """Seconds that a call takes: of the GPU between two events where it runs there."""
    if DEVICE.type != "cuda":
        begin = clock(threads)
        function()
        return clock(threads) - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure(
    results: dict[str, Any], rounds: int, threads: int, period: int = 1, gradients: Gradients | None = None
) -> dict[str, list[float]]:
    """Milliseconds a step: each contender in turn makes `period` steps a round; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in results}
    for turn in range(rounds + 1):
        for name, optimizer in results.items():
            total = 0.0
            for _ in range(period):
                if gradients is not None:
                    gradients.renew(optimizer.grads)
                total += timed(optimizer.step, threads)
            if turn:
                times[name].append(1e3 * total / period)
    return times


def product_rate(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of a 1024-cube product (on a GPU 8192), by the faster of torch's and ours."""
    side = 8192 if DEVICE.type == "cuda" else 1024
    a, best = torch.randn(side, side, device=DEVICE).to(dtype), float("inf")
    for turn in range(14):
        best = min(best, timed(lambda turn=turn: a @ a if turn % 2 else products.matmul(a, a), threads))
    return 2 * side**3 / best


def copy_bandwidth() -> float:
    """Bytes a second that a copy of a GiB reads and writes."""
    a = torch.zeros(2**28, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * 2**30 / min(timed(lambda: b.copy_(a), 1) for _ in range(10))


def training_ms(shapes: list[tuple[int, int]], tokens: int, threads: int) -> float:
    """Forward and backward of a batch through these matrices alone: a training step without attention and
    embedding.
    """
    total, part = 0.0, 1024
    for rows, columns in set(shapes):
        w, x, y = (_random([shape], 0)[0] for shape in ((rows, columns), (part, columns), (part, rows)))
        if DEVICE.type == "cuda":
            w, x, y = w.bfloat16(), x.bfloat16(), y.bfloat16()
        best = min(timed(lambda w=w, x=x, y=y: (x @ w.T, y @ w, y.T @ x), threads) for _ in range(5))
        total += 1e3 * best * shapes.count((rows, columns)) * tokens / part
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description="time of one optimizer step, ours and the peers'")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--rules", nargs="+", help="these rules in place of families")
    parser.add_argument("--cases", nargs="+", default=["model", "small"], choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", action="store_true", help="our rules without peers")
    parser.add_argument("--tokens", type=int, default=16384, help="batch whose training step the share is of")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the measurements here too")
    args = parser.parse_args()
    global DEVICE
    DEVICE = torch.device(args.device)
    optimizers = args.rules or [optimizer for family in args.families for optimizer in FAMILIES[family]]
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    rates = {
        "bf16": product_rate(torch.bfloat16, args.threads),
        "fp32": product_rate(torch.float32, args.threads),
    }
    base = contenders("adamw", CASES["model"], peers=False)["ours"]
    adamw_ms = statistics.median(measure({"ours": base}, 15, args.threads)["ours"])
    bandwidth = base.cost()[0] / adamw_ms * 1e3
    found_json: dict[str, Any] = {"device": args.device, "adamw_bandwidth": bandwidth, "rates": rates, "rows": []}
    if DEVICE.type == "cuda":
        found_json["copy_bandwidth"] = copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}; copies {found_json['copy_bandwidth'] / 1e9:.0f} GB/s")
    print(
        f"threads {args.threads}; AdamW {bandwidth / 1e9:.1f} GB/s; products bf16 {rates['bf16'] / 1e9:.0f}, "
        f"fp32 {rates['fp32'] / 1e9:.0f} GFLOP/s\n"
    )
    print("| rule | case | ours ms | peers ms | fastest peer / ours | bound ms | ours / bound | share of a step |")
    print("|---|---|---|---|---|---|---|---|")
    for case in args.cases:
        training = training_ms(CASES[case], args.tokens, args.threads)
        for optimizer in optimizers:
            gc.collect()
            results = contenders(optimizer, CASES[case], peers=not args.share)
            fresh = optimizer in FRESH
            gradients = Gradients(CASES[case], 4 if fresh else 3 if DEVICE.type == "cuda" else 0)
            rounds = max(1, args.rounds // 4) if optimizer in FRESH else args.rounds
            measured = measure(results, rounds, args.threads, PERIOD.get(optimizer, 1), gradients)
            times = {name: statistics.median(values) for name, values in measured.items()}
            peers = {name: value for name, value in times.items() if name != "ours"}
            ours, best = times.get("ours"), min(peers.values(), default=None)
            bound = None
            if ours is not None:
                moved, flops = results["ours"].cost()
                rate = rates["bf16" if optimizer in ("muon", "scion") else "fp32"]
                bound = 1e3 * (moved / bandwidth + sum(flops.values()) / rate)
            listed = ", ".join(f"{name} {value:.2f}" for name, value in sorted(peers.items(), key=lambda i: i[1]))
            cells = [
                optimizer,
                case,
                f"{ours:.2f}" if ours else "–",
                listed or "–",
                f"{best / ours:.2f}" if best and ours else "–",
                f"{bound:.2f}" if bound else "–",
                f"{ours / bound:.2f}" if ours and bound else "–",
                f"{ours / (ours + training):.1%}" if ours else "–",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
            found_json["rows"].append({"rule": optimizer, "case": case, "ours": ours, "bound": bound, "peers": peers})
    if args.json:
        args.json.write_text(json.dumps(found_json, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
