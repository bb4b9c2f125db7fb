"""Measure the machine at hand, products, factorizations, memory, traffic and host time, and write its cluster file."""

import itertools
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.cost_model.cluster import COLLECTIVES
from megatron_opt.kernels import eigenbasis, orthogonalize, products
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer

BUDGET = 0.15  # seconds spent on each measurement
GEMM_SIZES = (64, 128, 256, 512, 1024)  # on GPUs also 2048 and 4096
SMALL_SIZES = (16, 32, 64, 128)
FACTOR_SIZES = (32, 64, 128, 256, 512, 1024)
COLD_BYTES = 1 << 29  # more than any cache holds: a training step's states come from memory
PASS_SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)


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


def _gemm_sizes(device: torch.device) -> tuple[int, ...]:
    return (*GEMM_SIZES, 2048, 4096) if device.type == "cuda" else GEMM_SIZES


def _matrix(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def layer_rates(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of (k, 4k)·(4k, k) and (k, k)·(k, 4k) by torch, as layers do them, by k."""
    found = {}
    for k in _gemm_sizes(device):
        x = _matrix(device, dtype, k, 4 * k)

        def run(x: Tensor = x) -> Tensor:
            return (x @ x.mT) @ x

        found[k] = 2 * 2.0 * k * k * 4 * k / timed(run, device)
    return found


def _preconditioned(x: Tensor) -> Callable[[], Tensor]:
    """What SOAP does with a stack (B, k, K) of gradients on one side: the factor, symmetric, and two rotations. 6·B·k²·K."""
    factor = x @ x.mT
    basis = factor.clone()

    def run() -> Tensor:
        products.accumulate(factor, x, x.mT, 0.05, 0.95, symmetric=True)
        return products.matmul(basis, products.matmul(basis.mT, x))

    return run


def product_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """FLOP/s by k of what optimizers do with (k, 3k): preconditioning in fp32, Newton–Schulz in bf16."""
    found: dict[str, dict[int, float]] = {"fp32": {}, "bf16": {}}
    table = orthogonalize.coefficients("simple", 5)
    for k in _gemm_sizes(device):
        x = _matrix(device, torch.float32, k, 3 * k)
        found["fp32"][k] = 6.0 * k * k * 3 * k / timed(_preconditioned(x.unsqueeze(0)), device)
        seconds = timed(partial(orthogonalize.orthogonalize, [x], table), device)
        found["bf16"][k] = orthogonalize.flops(k, 3 * k, table) / seconds
    return found


def batch_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """The same of 16 equal k×k matrices in one call, by k."""
    found: dict[str, dict[int, float]] = {"fp32": {}, "bf16": {}}
    table = orthogonalize.coefficients("simple", 5)
    for k in SMALL_SIZES:
        x = _matrix(device, torch.float32, 16, k, k)
        found["fp32"][k] = 16 * 6.0 * k**3 / timed(_preconditioned(x), device)
        seconds = timed(partial(orthogonalize.orthogonalize, list(x.unbind()), table), device)
        found["bf16"][k] = 16 * orthogonalize.flops(k, k, table) / seconds
    return found


def factor_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """FLOP/s of an orthonormal basis by QR (8/3·k³), eigh (9·k³) and a triangular solve (k³), by k."""
    found: dict[str, dict[int, float]] = {"qr": {}, "eigh": {}, "solve": {}}
    for k in FACTOR_SIZES:
        x = _matrix(device, torch.float32, k, k)
        symmetric = x @ x.mT + k * torch.eye(k, device=device)
        lower = torch.linalg.cholesky(symmetric)
        found["qr"][k] = 8 / 3 * k**3 / timed(partial(eigenbasis.complete, x), device)
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


def pass_rates(device: torch.device) -> dict[int, float]:
    """Bytes a second of a fused AdamW step, by the bytes that it moves, on tensors that no cache still holds."""
    rule, found = registry.build("adamw", {}), {}
    for count in PASS_SIZES:
        moved = int(rule.cost(count).elementwise_bytes)
        tensors = []
        for _ in range(max(1, COLD_BYTES // moved)):
            weight = torch.zeros(count, device=device)
            tensors.append((weight, torch.ones_like(weight), rule.init_state(weight)))
        turns = itertools.cycle(tensors)

        def run(turns: Iterator[Any] = turns) -> None:
            weight, grad, state = next(turns)
            rule.update([weight], [grad], [state], 1, 1e-3, 0.1)

        found[moved] = moved / timed(run, device)
    return found


def rule_overheads(device: torch.device) -> dict[str, float]:
    """Host seconds that each rule spends on one matrix or slice in a step: on 32 of 8×8, whose FLOPs take no time."""
    found = {}
    infos = [MatrixInfo(f"w{i}", (8, 8)) for i in range(32)]
    for name in sorted(registry.rules()):
        rule = registry.build(name, {})
        weights = [_matrix(device, torch.float32, *info.shape) for info in infos]
        if isinstance(rule, MatrixOptimizer):
            states = [rule.init_state(weight, info) for weight, info in zip(weights, infos)]
            rule.update([weight.clone() for weight in weights], states, 1, infos)
            seconds = timed(lambda r=rule, w=weights, s=states: r.update([x.clone() for x in w], s, 11, infos), device)  # type: ignore[misc]
        else:
            flats = [weight.flatten() for weight in weights]
            states = [rule.init_state(flat) for flat in flats]
            grads = [flat.clone() for flat in flats]
            seconds = timed(lambda r=rule, w=flats, g=grads, s=states: r.update(w, g, s, 11, 1e-6, 0.0), device)  # type: ignore[misc]
        found[name] = seconds / len(infos)
    return found


def fragment_overhead(device: torch.device) -> float:
    """Host seconds of one held piece in a step: its norm, looking it up, decay and update."""
    pieces = [(torch.zeros(8, device=device), torch.zeros(8, device=device)) for _ in range(64)]
    order = {f"decoder.layers.{index}.weight": index for index in range(len(pieces))}

    def run() -> None:
        norms = torch.stack(torch._foreach_norm([grad for _, grad in pieces])).double().tolist()
        sums = torch.zeros(len(pieces), dtype=torch.float64)
        for name, index in order.items():
            sums[index] += norms[order[name]]
        for name, (weight, update) in zip(order, pieces):
            if float(sums[order[name]]) == 0.0 and sums[order[name]].isfinite():
                weight[0:8].mul_(1.0 - 1e-6)
                weight[0:8].add_(update[0:8], alpha=-1e-3)

    return timed(run, device) / len(pieces)


def together(ranks: int) -> tuple[float, float]:
    """(products, passes): the share of its rate alone that each of `ranks` processes keeps when all work at once."""
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(ranks)
    workers = [context.Process(target=_work_together, args=(barrier, queue)) for _ in range(ranks)]
    alone = _alone()
    for worker in workers:
        worker.start()
    try:
        found = [queue.get(timeout=120) for _ in workers]
    finally:
        for worker in workers:
            worker.join(30)
            if worker.is_alive():
                worker.terminate()
    shares = [min(1.0, statistics.mean(each[kind] for each in found) / alone[kind]) for kind in (0, 1)]
    return shares[0], shares[1]


def _alone(barrier: Any = None) -> tuple[float, float]:
    """FLOP/s of a product and bytes/s of a pass, by this process; behind a barrier where there are several."""
    torch.set_num_threads(1)
    device, k = torch.device("cpu"), 512
    x = _matrix(device, torch.float32, k, k)
    rule, weight = registry.build("adamw", {}), torch.zeros(1 << 23)
    grad, state = torch.ones_like(weight), rule.init_state(weight)
    rates = []
    for work in (lambda: products.matmul(x, x), lambda: rule.update([weight], [grad], [state], 1, 1e-3, 0.1)):
        work()
        if barrier is not None:
            barrier.wait()
        rates.append(1.0 / timed(work, device, 4 * BUDGET))
    return rates[0], rates[1]


def _work_together(barrier: Any, queue: Any) -> None:
    queue.put(_alone(barrier))


def link(ranks: int) -> tuple[float, float, dict[str, float]]:
    """Of `ranks` processes on this host: bytes/s that each sends in an all-to-all, seconds of a small all-reduce,
    and the share of that rate which each ring collective reaches.
    """
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

    part = torch.ones(large.numel() // ranks, device=device)
    out = torch.empty_like(large)

    def seconds(run: Callable[[], Any], times: int) -> float:
        found = []
        for _ in range(times + 1):
            dist.barrier()
            begin = time.perf_counter()
            run()
            _wait(device)
            found.append(time.perf_counter() - begin)
        return statistics.median(found[1:])

    latency = seconds(partial(dist.all_reduce, small), 50)
    sent = large.numel() * 4 * (ranks - 1) / ranks
    runs: dict[str, tuple[float, Callable[[], Any]]] = {  # bytes that each rank sends, and the collective
        "all_to_all": (sent, partial(dist.all_to_all_single, out, large)),
        "all_reduce": (2 * sent, partial(dist.all_reduce, out)),
        "reduce_scatter": (sent, partial(dist.reduce_scatter_tensor, part, large)),
        "all_gather": (sent, partial(dist.all_gather_into_tensor, out, part)),
    }
    rates = {kind: count / max(seconds(run, 10) - latency, 1e-9) for kind, (count, run) in runs.items()}
    if rank == 0:
        shares = {kind: rates[kind] / rates["all_to_all"] for kind in COLLECTIVES}
        queue.put((rates["all_to_all"], latency, shares))
    dist.destroy_process_group()


def calibrate(ranks: int = 0) -> str:
    """Text of a cluster file of this machine; measures for about half a minute."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda") if cuda else torch.device("cpu")
    threads = torch.get_num_threads()
    if not cuda:
        torch.set_num_threads(1)  # a rank has one core
    try:
        rates = {"gemm": product_rates(device), "small_gemm": batch_rates(device)}
        rates |= {kind: {"fp32": curve} for kind, curve in factor_rates(device).items()}
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        rates["attention"] = {name: attention_rate(device, dtype) for name, dtype in types.items()}
        rates["layer"] = {name: layer_rates(device, dtype) for name, dtype in types.items()}
        passes = pass_rates(device)
        by_rule, fragment = rule_overheads(device), fragment_overhead(device)
        devices = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
        shares = (1.0, 1.0) if cuda or devices == 1 else together(devices)
    finally:
        torch.set_num_threads(threads)
    linked = link(ranks or max(2, devices)) if (cuda and devices > 1) or not cuda else (1e9, 1e-5, {})
    return _file(cuda, devices, rates, passes, shares, by_rule, fragment, linked)


def _map(values: Mapping[Any, float]) -> str:
    return "{" + ", ".join(f"{key}: {value:.3g}" for key, value in values.items()) + "}"


def _file(
    cuda: bool,
    devices: int,
    rates: dict[str, dict[str, dict[int, float]]],
    passes: dict[int, float],
    shares: tuple[float, float],
    by_rule: dict[str, float],
    fragment: float,
    link_found: tuple[float, float, dict[str, float]],
) -> str:
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} core"
    sent, latency, collectives = link_found
    if cuda:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    matrix = statistics.median(by_rule.values())
    lines = [
        "name: this-machine",
        f'title: "{devices} × {name}, measured"',
        f'sources: ["megatron-opt cost calibrate, {time.strftime("%Y-%m-%d")}, torch {torch.__version__}"]',
        f"devices: {devices if cuda else 64 * devices}  # at most; ranks beyond the cores take turns"
        if not cuda
        else f"devices: {devices}",
        "device:",
        "  peak: " + _map({key: max(curve.values()) for key, curve in rates["gemm"].items()}),
        f"  memory: {memory:.4g}",
        "  reserved: 0" if not cuda else "  reserved: 2.0e+9",
        "  memory_bandwidth: " + _map(passes),
    ]
    if not cuda:
        lines.append(f"  shared_cores: {devices}")
        lines.append(f"  together: {{compute: {shares[0]:.3g}, memory: {shares[1]:.3g}}}")
    lines.append("rates:")
    for kind, by_type in rates.items():
        lines.append(f"  {kind}:")
        lines += [f"    {dtype}: {_map(curve)}" for dtype, curve in by_type.items()]
    lines += [
        f"node: {{gpus: {devices if cuda else 1024}, bandwidth: {sent:.4g}, latency: {latency:.3g}}}",
        f"network: {{bandwidth: {sent:.4g}, latency: {latency:.3g}}}",
        f"collectives: {_map(collectives)}  # share of the bandwidth above, which is an all-to-all's",
        "efficiency: {elementwise: 1.0, node: 1.0, network: 1.0, step: 1.0, optimizer: 1.0, overlap: "
        + ("1.0}" if cuda else "0.0}"),
        f"overheads: {{matrix: {matrix:.3g}, fragment: {fragment:.3g}, bucket: {4 * matrix:.3g}, "
        f"step: {10 * matrix:.3g}, layer: {0.0 if cuda else 20 * fragment:.3g}}}",
        f"rule_overheads: {_map(by_rule)}",
    ]
    return "\n".join(lines) + "\n"
