"""What only several processes show: the engine's host time in a step, what cores take from one another, links."""

import os
import queue
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_opt.errors import UserError
from megatron_opt.kernels import products
from megatron_opt.layout.region import Region
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import Group

ROUNDS = 7  # alone and together take turns so often: neighbours on a machine come and go
ENGINE_MATRICES = (8, 104)
LAYERS = (2, 8)
CACHE_BYTES = 1 << 28  # more than the caches hold


def answers(work: Callable[..., None], ranks: int, count: int, *arguments: Any) -> list[Any]:
    """Runs `work(rank, ranks, barrier, queue, *arguments)` in `ranks` processes; the first `count` things that they put into
    the queue. Raises UserError where one of them fails.
    """
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(ranks)
    workers = [context.Process(target=work, args=(rank, ranks, barrier, results, *arguments)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    said: list[Any] = []
    try:
        while len(said) < count:
            try:
                said.append(results.get(timeout=1.0))
            except queue.Empty:
                if any(worker.exitcode for worker in workers):
                    raise UserError("a process of the calibration failed; its error is above.") from None
    finally:
        for worker in workers:
            if len(said) == count:
                worker.join(30)
            if worker.is_alive():
                worker.terminate()
    return said


def forget(buffer: torch.Tensor) -> None:
    """Fill the caches with other data, as the passes of a training step do."""
    buffer.add_(1.0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def together(ranks: int) -> tuple[float, float]:
    """Where `ranks` processes work at once: the share of its FLOP/s alone that each keeps, and its bytes/s of passes.

    Passes are not compared with the same process alone: that rate depends on which pages it was given.
    """
    shares = answers(_alone_and_together, ranks, ranks)
    products_share, bandwidth = (statistics.mean(each[kind] for each in shares) for kind in (0, 1))
    return min(1.0, products_share), bandwidth


def _alone_and_together(rank: int, ranks: int, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    optimizer, weight = registry.build("adamw", {}), torch.zeros(1 << 23)
    grad, state = torch.ones_like(weight), optimizer.init_state(weight)

    def seconds(work: Callable[[], Any], times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - begin) / times

    multiply = partial(products.matmul, x, x)
    update = partial(optimizer.update, [weight], [grad], [state], 1, 1e-3, 0.1)
    multiply()
    update()
    crowded, alone, passing = [], [], []
    for _ in range(ROUNDS):
        barrier.wait()
        crowded.append(seconds(multiply, 50))
        for turn in range(ranks):
            barrier.wait()
            if turn == rank:
                alone.append(seconds(multiply, 50))
        barrier.wait()
        passing.append(seconds(update, 10))
    moved = optimizer.cost(weight.numel()).elementwise_bytes
    results.put((min(alone) / statistics.median(crowded), moved / statistics.median(passing)))


def link(ranks: int) -> tuple[float, float, float, dict[str, float]]:
    """Of `ranks` processes on this host: bytes/s that each sends in an all-to-all, seconds of a small all-reduce one after
    another and amid other work, and the share of that rate which each ring collective reaches.
    """
    measured: tuple[float, float, float, dict[str, float]] = answers(_exchange, ranks, 1, _free_port())[0]
    return measured


def rate_of(count: float, seconds: float, latency: float) -> float:
    """Bytes/s of a transfer, its latency taken off: at most half of its time, where a busy machine delayed the small one."""
    return count / max(seconds - latency, 0.5 * seconds)


def _exchange(rank: int, ranks: int, barrier: Any, results: Any, port: int) -> None:
    from megatron_opt.cost_model.cluster import COLLECTIVES

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=ranks)
    small, large = (torch.ones(ranks * n, device=device) for n in (64, 1 << 21))
    part = torch.ones(large.numel() // ranks, device=device)
    out, other = torch.empty_like(large), torch.zeros(CACHE_BYTES // 4)

    def seconds(
        run: Callable[[], Any], times: int, before: Callable[[], Any] | None = None, share: float = 0.5
    ) -> float:
        measured = []
        for _ in range(times + 1):
            if before is not None:
                before()
            dist.barrier()
            if before is not None:
                part.norm().item()  # a little work between two collectives
            begin = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            measured.append(time.perf_counter() - begin)
        return sorted(measured[1:])[int(share * times)]

    # A quarter of the small ones is soon: where threads share cores, the others may wait for a scheduler's slice.
    latency = seconds(partial(dist.all_reduce, small), 50, share=0.25)
    amid = seconds(partial(dist.all_reduce, small), 25, partial(forget, other), share=0.25)
    sent = large.numel() * 4 * (ranks - 1) / ranks
    runs: dict[str, tuple[float, Callable[[], Any]]] = {  # bytes that each rank sends, and the collective
        "all_to_all": (sent, partial(dist.all_to_all_single, out, large)),
        "all_reduce": (2 * sent, partial(dist.all_reduce, out)),
        "reduce_scatter": (sent, partial(dist.reduce_scatter_single, part, large)),
        "all_gather": (sent, partial(dist.all_gather_single, out, part)),
    }
    rates = {kind: rate_of(count, seconds(run, 10), latency) for kind, (count, run) in runs.items()}
    if rank == 0:
        shares = {kind: rates[kind] / rates["all_to_all"] for kind in COLLECTIVES}
        results.put((rates["all_to_all"], latency, max(amid, latency), shares))
    dist.destroy_process_group()


def engine() -> tuple[float, float, float, float]:
    """Host seconds of the sharded optimizer's own step: of an empty one, and what each matrix adds to it as one fragment
    that Lion trains, or Muon, their rules' own time in it; then of forward and backward through one of Megatron's layers.
    """
    seconds: tuple[float, float, float, float] = answers(_engine_steps, 1, 1, _free_port())[0]
    return seconds


def _engine_steps(rank: int, ranks: int, barrier: Any, results: Any, port: int) -> None:
    from megatron_opt import platform

    platform.activate()
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=0, world_size=1)
    few, many = ENGINE_MATRICES
    seconds = {
        (optimizer, count): _engine_seconds(optimizer, count) for optimizer in ("lion", "muon") for count in (few, many)
    }
    slopes = {
        optimizer: (seconds[optimizer, many] - seconds[optimizer, few]) / (many - few) for optimizer in ("lion", "muon")
    }
    step = seconds["lion", few] - slopes["lion"] * few
    results.put((max(step, 0.0), slopes["lion"], slopes["muon"], _layer_seconds()))
    dist.destroy_process_group()


def _engine_seconds(name: str, count: int) -> float:
    """Median seconds of the engine's step on `count` matrices of 8×8, each a fragment, from cold caches."""
    from megatron.core.optimizer import OptimizerConfig

    from megatron_opt.distributed.exchange import Exchange
    from megatron_opt.distributed.megatron_optimizer import MegatronShardedOptimizer
    from megatron_opt.distributed.param_shards import ParamShard, Rect
    from megatron_opt.distributed.shard_group import ShardGroup

    infos = [MatrixInfo(f"decoder.layers.{index}.weight", (8, 8)) for index in range(count)]
    param_shards = []
    for info in infos:
        param = torch.nn.Parameter(torch.ones(info.shape))
        param.main_grad = torch.ones(info.shape)  # type: ignore[attr-defined]
        view: Any = SimpleNamespace(param=param, counts=True)
        param_shards.append(ParamShard(view, 0, 64, param.detach().view(-1), [Rect(info.name, Region(0, 8, 0, 8))]))
    holdings = [[(index, param_shard.rects[0]) for index, param_shard in enumerate(param_shards)]]
    shard_group = ShardGroup(
        "", None, 0, 1, param_shards, holdings, {info.name: info for info in infos}, Exchange(None, 0, 1)
    )
    ddp = SimpleNamespace(use_distributed_optimizer=False, overlap_param_gather=False)
    optimizer = MegatronShardedOptimizer(
        OptimizerConfig(optimizer="adam", lr=1e-6, clip_grad=1.0),
        [SimpleNamespace(ddp_config=ddp)],
        [shard_group],
        [Group("all", name, {}, 1.0, True, "decoupled", "all", tuple(infos))],
    )
    other = torch.zeros(CACHE_BYTES // 4)
    optimizer.step()
    times = []
    for _ in range(7):
        forget(other)
        begin = time.thread_time()
        optimizer.step()
        times.append(time.thread_time() - begin)
    return statistics.median(times)


def _layer_seconds() -> float:
    """Median seconds that one more layer takes whose products are next to nothing."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlock

    parallel_state.initialize_model_parallel(1, 1)
    model_parallel_cuda_manual_seed(1)
    medians = []
    for layers in LAYERS:
        config = TransformerConfig(
            num_layers=layers, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, add_bias_linear=False,
            gated_linear_unit=True, activation_func=torch.nn.functional.silu, normalization="RMSNorm",
            use_cpu_initialization=True, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
            masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        )  # fmt: skip
        block = TransformerBlock(config, get_gpt_layer_local_spec(normalization="RMSNorm"))
        x, mask = torch.randn(8, 1, 16, requires_grad=True), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        times = []
        for _ in range(9):
            begin = time.thread_time()
            block(x, mask).sum().backward()
            times.append(time.thread_time() - begin)
        medians.append(statistics.median(times))
    return max(0.0, medians[1] - medians[0]) / (LAYERS[1] - LAYERS[0])
