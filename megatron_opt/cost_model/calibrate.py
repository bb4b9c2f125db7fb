"""Measure the machine at hand, products, factorizations, memory, traffic and host time, and write its cluster file."""

import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.cost_model.cluster import interpolate
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

BUDGET = 0.25  # seconds spent on each measurement
GEMM_SIZES = (64, 128, 256, 512, 1024, 2048)
SMALL_SIZES = (16, 32, 64, 128)
FACTOR_SIZES = (32, 64, 128, 256, 512, 1024)


def timed(run: Callable[[], Any], device: torch.device, budget: float = BUDGET) -> float:
    """Median seconds of a call, after one to warm up; at least three calls, about `budget` seconds in all.

    On the CPU the thread's own time is taken, so that other processes on the machine do not count.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    run()
    _wait(device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < budget and len(times) < 200):
        begin = clock()
        run()
        _wait(device)
        times.append(clock() - begin)
    return max(statistics.median(times), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matrix(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def product_rates(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of (k, 4k)·(4k, k) and (k, k)·(k, 4k), as Newton–Schulz and layers do them, by k."""
    found = {}
    for k in GEMM_SIZES:
        x = _matrix(device, dtype, k, 4 * k)

        def run(x: Tensor = x) -> Tensor:
            return (x @ x.mT) @ x

        found[k] = 2 * 2.0 * k * k * 4 * k / timed(run, device)
    return found


def batch_rates(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of batched products of 16 equal k×k matrices, by k."""
    found = {}
    for k in SMALL_SIZES:
        x = _matrix(device, dtype, 16, k, k)

        def run(x: Tensor = x) -> Tensor:
            return x @ x.mT

        found[k] = 16 * 2.0 * k**3 / timed(run, device)
    return found


def factor_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """FLOP/s of QR (8/3·k³), eigh (9·k³) and a triangular solve (k³), by k."""
    found: dict[str, dict[int, float]] = {"qr": {}, "eigh": {}, "solve": {}}
    for k in FACTOR_SIZES:
        x = _matrix(device, torch.float32, k, k)
        symmetric = x @ x.mT + k * torch.eye(k, device=device)
        lower = torch.linalg.cholesky(symmetric)
        found["qr"][k] = 8 / 3 * k**3 / timed(partial(torch.linalg.qr, x), device)
        found["eigh"][k] = 9.0 * k**3 / timed(partial(torch.linalg.eigh, symmetric), device)
        solve = partial(torch.linalg.solve_triangular, lower, x, upper=False)
        found["solve"][k] = 1.0 * k**3 / timed(solve, device)
    return found


def attention_rate(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of scores and values of causal attention, by sequence; the causal half is counted."""
    found = {}
    for sequence in (128, 512, 1024):
        q = _matrix(device, dtype, 8, sequence, 64)

        def run(q: Tensor = q) -> Tensor:
            return torch.softmax(q @ q.mT, -1) @ q

        found[sequence] = 8 * 2.0 * sequence * sequence * 64 / timed(run, device)
    return found


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second of a fused AdamW step over 16M parameters, by the rule's own count of bytes."""
    rule = registry.build("adamw", {})
    weight = torch.zeros(1 << 24, device=device)
    grad, state = torch.ones_like(weight), rule.init_state(weight)
    moved = rule.cost(weight.numel()).elementwise_bytes
    return moved / timed(lambda: rule.update([weight], [grad], [state], 1, 1e-3, 0.1), device, 1.0)


def matrix_overhead(device: torch.device, rates: dict[int, float]) -> float:
    """Host seconds of one matrix in a step of Muon: what 32 matrices of different shapes take beyond their FLOPs."""
    rule = registry.build("muon", {"fp32_matmul_prec": "high"})
    infos = [MatrixInfo(f"w{i}", (16 + i, 48 + i)) for i in range(32)]
    weights = [_matrix(device, torch.float32, *info.shape) for info in infos]
    states = [rule.init_state(w, info) for w, info in zip(weights, infos)]
    seconds = timed(lambda: rule.update([w.clone() for w in weights], states, 1, infos), device, 0.5)
    curve = tuple(sorted((float(k), rate) for k, rate in rates.items()))
    flops = sum(rule.cost(info).mean_flops() / interpolate(curve, 32) for info in infos)
    return max(1e-6, (seconds - flops) / len(infos))


def link(ranks: int) -> tuple[float, float]:
    """(bytes/s that each rank sends, seconds of a small message) of an all-to-all of `ranks` processes on this host."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_exchange, args=(rank, ranks, port, queue)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    try:
        return queue.get(timeout=120)
    finally:
        for worker in workers:
            worker.join(30)
            if worker.is_alive():
                worker.terminate()


def _exchange(rank: int, ranks: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=ranks)
    small, large = (torch.ones(ranks * n, device=device) for n in (64, 1 << 21))

    def seconds(tensor: Tensor, times: int) -> float:
        out = torch.empty_like(tensor)
        dist.all_to_all_single(out, tensor)
        _wait(device)
        begin = time.perf_counter()
        for _ in range(times):
            dist.all_to_all_single(out, tensor)
        _wait(device)
        return (time.perf_counter() - begin) / times

    latency = seconds(small, 50)
    sent = large.numel() * 4 * (ranks - 1) / ranks
    bandwidth = sent / max(seconds(large, 10) - latency, 1e-9)
    if rank == 0:
        queue.put((bandwidth, latency))
    dist.destroy_process_group()


def calibrate(ranks: int = 0) -> str:
    """Text of a cluster file of this machine; measures for about half a minute."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda") if cuda else torch.device("cpu")
    threads = torch.get_num_threads()
    if not cuda:
        torch.set_num_threads(1)  # a rank has one core
    try:
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        gemm = {name: product_rates(device, dtype) for name, dtype in types.items()}
        small = {name: batch_rates(device, dtype) for name, dtype in types.items()}
        factors = factor_rates(device)
        attention = {name: attention_rate(device, dtype) for name, dtype in types.items()}
        bandwidth = memory_bandwidth(device)
        overhead = matrix_overhead(device, gemm["fp32"])
    finally:
        torch.set_num_threads(threads)
    devices = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    sent, latency = link(ranks or max(2, devices)) if (cuda and devices > 1) or not cuda else (1e9, 1e-5)
    rates = {"gemm": gemm, "small_gemm": small, **{kind: {"fp32": curve} for kind, curve in factors.items()}}
    rates["attention"] = attention
    return _file(cuda, devices, rates, bandwidth, overhead, sent, latency)


def _file(
    cuda: bool,
    devices: int,
    rates: dict[str, dict[str, dict[int, float]]],
    bandwidth: float,
    overhead: float,
    sent: float,
    latency: float,
) -> str:
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} core"
    if cuda:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    lines = [
        "name: this-machine",
        f'title: "{devices} × {name}, measured"',
        f'sources: ["megatron-opt cost calibrate, {time.strftime("%Y-%m-%d")}, torch {torch.__version__}"]',
        f"devices: {devices if cuda else 64 * devices}  # at most; ranks beyond the cores take turns"
        if not cuda
        else f"devices: {devices}",
        "device:",
        "  peak: {" + ", ".join(f"{key}: {max(curve.values()):.4g}" for key, curve in rates["gemm"].items()) + "}",
        f"  memory: {memory:.4g}",
        "  reserved: 0" if not cuda else "  reserved: 2.0e+9",
        f"  memory_bandwidth: {bandwidth:.4g}",
    ]
    if not cuda:
        lines.append(f"  shared_cores: {devices}")
    lines.append("rates:")
    for kind, by_type in rates.items():
        lines.append(f"  {kind}:")
        for dtype, curve in by_type.items():
            points = ", ".join(f"{k}: {rate:.3g}" for k, rate in curve.items())
            lines.append(f"    {dtype}: {{{points}}}")
    lines += [
        f"node: {{gpus: {devices if cuda else 1024}, bandwidth: {sent:.4g}, latency: {latency:.3g}}}",
        f"network: {{bandwidth: {sent:.4g}, latency: {latency:.3g}}}",
        "efficiency: {elementwise: 1.0, node: 1.0, network: 1.0, step: 1.0, optimizer: 1.0, overlap: "
        + ("1.0}" if cuda else "0.0}"),
        f"overheads: {{matrix: {overhead:.3g}, fragment: {overhead / 4:.3g}, bucket: {4 * overhead:.3g}, "
        f"step: {10 * overhead:.3g}, layer: {0.0 if cuda else 40 * overhead / 20:.3g}}}",
    ]
    return "\n".join(lines) + "\n"
