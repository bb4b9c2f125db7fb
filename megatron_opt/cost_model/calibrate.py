"""Measure the machine at hand, products, factorizations, memory, traffic and host time, and write its cluster file."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_opt.cost_model.calibrate_ranks import CACHE_BYTES, engine, forget, link, together
from megatron_opt.cost_model.cluster import Overheads
from megatron_opt.kernels import eigenbasis, multi_tensor, orthogonalize, products
from megatron_opt.kernels.multi_tensor import Coefficients, Sum
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer

BUDGET = 0.15  # seconds spent on each measurement
GEMM_SIZES = (64, 128, 256, 512, 1024)  # on GPUs also 2048 and 4096
SMALL_SIZES = (16, 32, 64, 128)
FACTOR_SIZES = (32, 64, 128, 256, 512, 1024)
PIECE = 1 << 18  # elements of a matrix in the passes over many
PASS_SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24)


def timed(
    run: Callable[[], Any], device: torch.device, budget: float = BUDGET, before: Callable[[], Any] | None = None
) -> float:
    """Median seconds of a call, after one to warm up; at least three calls, about `budget` seconds in all.

    On the CPU the thread's own time is taken, so that other processes on the machine do not count.
    """
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    run()
    _wait(device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < budget and len(times) < 200):
        if before is not None:
            before()
            _wait(device)
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
    rates = {}
    for k in _gemm_sizes(device):
        x = _matrix(device, dtype, k, 4 * k)

        def run(x: Tensor = x) -> Tensor:
            return (x @ x.mT) @ x

        rates[k] = 2 * 2.0 * k * k * 4 * k / timed(run, device)
    return rates


def fp8_rates(device: torch.device) -> dict[int, float]:
    """The same of E4M3 numbers with one scale, by k; none where the device has no such products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return {}
    rates, one = {}, torch.ones((), device=device)
    for k in _gemm_sizes(device):
        wide, tall = (
            _matrix(device, torch.float32, *shape).to(torch.float8_e4m3fn) for shape in ((k, 4 * k), (4 * k, k))
        )
        square = _matrix(device, torch.float32, k, k).to(torch.float8_e4m3fn)

        def run(wide: Tensor = wide, tall: Tensor = tall, square: Tensor = square) -> None:
            torch._scaled_mm(wide, wide.t(), one, one, out_dtype=torch.bfloat16)  # the second operand by column
            torch._scaled_mm(square, tall.t(), one, one, out_dtype=torch.bfloat16)

        rates[k] = 2 * 2.0 * k * k * 4 * k / timed(run, device)
    return rates


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
    rates: dict[str, dict[int, float]] = {"fp32": {}, "bf16": {}}
    table = orthogonalize.coefficients("simple", 5)
    for k in _gemm_sizes(device):
        x = _matrix(device, torch.float32, k, 3 * k)
        rates["fp32"][k] = 6.0 * k * k * 3 * k / timed(_preconditioned(x.unsqueeze(0)), device)
        seconds = timed(partial(orthogonalize.orthogonalize, [x], table), device)
        rates["bf16"][k] = orthogonalize.flops(k, 3 * k, table) / seconds
    return rates


def batch_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """The same of 16 equal k×k matrices in one call, by k."""
    rates: dict[str, dict[int, float]] = {"fp32": {}, "bf16": {}}
    table = orthogonalize.coefficients("simple", 5)
    for k in SMALL_SIZES:
        x = _matrix(device, torch.float32, 16, k, k)
        rates["fp32"][k] = 16 * 6.0 * k**3 / timed(_preconditioned(x), device)
        seconds = timed(partial(orthogonalize.orthogonalize, list(x.unbind()), table), device)
        rates["bf16"][k] = 16 * orthogonalize.flops(k, k, table) / seconds
    return rates


def factor_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """FLOP/s of an orthonormal basis by QR (8/3·k³), eigh (9·k³) and a triangular solve (k³), by k."""
    rates: dict[str, dict[int, float]] = {"qr": {}, "eigh": {}, "solve": {}}
    for k in FACTOR_SIZES:
        x = _matrix(device, torch.float32, k, k)
        symmetric = x @ x.mT + k * torch.eye(k, device=device)
        lower = torch.linalg.cholesky(symmetric)
        rates["qr"][k] = 8 / 3 * k**3 / timed(partial(eigenbasis.complete, x), device)
        rates["eigh"][k] = 9.0 * k**3 / timed(partial(torch.linalg.eigh, symmetric), device)
        solve = partial(torch.linalg.solve_triangular, lower, x, upper=False)
        rates["solve"][k] = 1.0 * k**3 / timed(solve, device)
    return rates


def attention_rate(device: torch.device, dtype: torch.dtype) -> dict[int, float]:
    """FLOP/s of scores and values of causal attention, by sequence; the causal half is counted."""
    rates = {}
    for sequence in (128, 512, 1024):
        q = _matrix(device, dtype, 8, sequence, 64)

        def run(q: Tensor = q) -> Tensor:
            return torch.softmax(q @ q.mT, -1) @ q

        rates[sequence] = 8 * 2.0 * sequence * sequence * 64 / timed(run, device)
    return rates


def pass_rates(device: torch.device) -> tuple[dict[int, float], dict[int, float]]:
    """Bytes a second of a fused AdamW step and of a sum of squares over a list of pieces that no cache still holds, by the
    bytes that they move in all.
    """
    optimizer, updates, reads = registry.build("adamw", {}), {}, {}
    evict = partial(forget, torch.zeros(CACHE_BYTES // 4, device=device))
    for count in PASS_SIZES:
        piece = min(count, PIECE)
        weights = [torch.zeros(piece, device=device) for _ in range(count // piece)]
        grads, states = [torch.ones_like(w) for w in weights], [optimizer.init_state(w) for w in weights]
        moved = int(optimizer.cost(count).elementwise_bytes)
        update = partial(optimizer.update, weights, grads, states, 1, 1e-3, 0.1)
        updates[moved] = moved / timed(update, device, before=evict)
        read = partial(multi_tensor.sums, Sum.GRADIENT_NORM, grads, Coefficients())
        reads[4 * count] = 4 * count / timed(read, device, before=evict)
    return updates, reads


def rule_overheads(device: torch.device) -> dict[str, float]:
    """Host seconds that each rule spends on one matrix or slice in a step: on 32 of 8×8, whose FLOPs take no time."""
    overheads = {}
    infos = [MatrixInfo(f"w{i}", (8, 8)) for i in range(32)]
    evict = partial(forget, torch.zeros(CACHE_BYTES // 4))
    for name in sorted(registry.optimizers()):
        optimizer = registry.build(name, {})
        weights = [_matrix(device, torch.float32, *info.shape) for info in infos]
        run: Callable[[], Any]
        if isinstance(optimizer, MatrixOptimizer):
            states = [optimizer.init_state(weight, info) for weight, info in zip(weights, infos)]
            optimizer.update([weight.clone() for weight in weights], states, 1, infos)
            run = lambda r=optimizer, w=weights, s=states: r.update([x.clone() for x in w], s, 11, infos)  # type: ignore[misc]  # noqa: E731
        else:
            flats = [weight.flatten() for weight in weights]
            states = [optimizer.init_state(flat) for flat in flats]
            run = partial(optimizer.update, flats, [flat.clone() for flat in flats], states, 11, 1e-6, 0.0)
        overheads[name] = timed(run, device, before=evict) / len(infos)
    return overheads


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
        rates["layer"] |= {"fp8": fp8} if (fp8 := fp8_rates(device)) else {}
        passes, reads = pass_rates(device)
        overheads = host_overheads(rule_overheads(device), *engine())
        devices = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
        shares = (1.0, 1.0)
        if not cuda and devices > 1:
            products_share, bandwidth = together(devices)
            shares = products_share, min(1.0, bandwidth / passes[max(passes)])
    finally:
        torch.set_num_threads(threads)
    linked = link(ranks or max(2, devices)) if (cuda and devices > 1) or not cuda else (1e9, 1e-5, 1e-5, {})
    return _file(cuda, devices, rates, (passes, reads), shares, overheads, linked)


def host_overheads(
    by_optimizer: dict[str, float], step: float, element: float, matrix: float, layer: float
) -> Overheads:
    """The engine's share of what an element-wise rule's matrix (Lion's) and a matrix rule's (Muon's) take in a step."""
    fragment = max(0.0, element - by_optimizer["lion"])
    own = max(0.0, matrix - fragment - by_optimizer["muon"])
    matrices = {name for name, optimizer in registry.optimizers().items() if issubclass(optimizer, MatrixOptimizer)}
    by_optimizer = {name: seconds + (own if name in matrices else 0.0) for name, seconds in by_optimizer.items()}
    median = statistics.median(by_optimizer[name] for name in matrices)
    return Overheads(matrix=median, fragment=fragment, step=step, layer=layer, by_optimizer=by_optimizer)


def _map(values: Mapping[Any, float]) -> str:
    return "{" + ", ".join(f"{key}: {value:.3g}" for key, value in values.items()) + "}"


def _file(
    cuda: bool,
    devices: int,
    rates: dict[str, dict[str, dict[int, float]]],
    passes: tuple[dict[int, float], dict[int, float]],
    shares: tuple[float, float],
    host: Overheads,
    link_rates: tuple[float, float, float, dict[str, float]],
) -> str:
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()} core"
    sent, latency, reduction, collectives = link_rates
    if cuda:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    lines = [
        "name: this-machine",
        "measured: true",
        f'title: "{devices} × {name}, measured"',
        f'sources: ["megatron-opt cost calibrate, {time.strftime("%Y-%m-%d")}, torch {torch.__version__}"]',
        f"devices: {devices if cuda else 64 * devices}  # at most; ranks beyond the cores take turns"
        if not cuda
        else f"devices: {devices}",
        "device:",
        "  peak: " + _map({key: max(curve.values()) for key, curve in rates["gemm"].items()}),
        f"  memory: {memory:.4g}",
        "  reserved: 0" if not cuda else "  reserved: 2.0e+9",
        "  memory_bandwidth: " + _map(passes[0]),
        "  read_bandwidth: " + _map(passes[1]),
    ]
    if cuda:
        lines.append("  capability: {}.{}".format(*torch.cuda.get_device_capability()))
    else:
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
        f"overheads: {{matrix: {host.matrix:.3g}, fragment: {host.fragment:.3g}, bucket: {4 * host.matrix:.3g}, "
        f"step: {host.step:.3g}, layer: {0.0 if cuda else host.layer:.3g}, reduction: {reduction:.3g}}}",
        f"rule_overheads: {_map(host.by_optimizer)}",
    ]
    return "\n".join(lines) + "\n"
