"""One rank's optimizer of a job that need not be there, on a pretended GPU: what a step would launch, move and wait for.

Parameters, gradients and holdings are what the rank would have; exchanges send nothing, and what would arrive is whatever
memory holds. Waits, launches and bytes are counted by `platform.pretended_gpu`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_opt.distributed import exchange as exchange_module
from megatron_opt.distributed import shard_group as shard_group_module
from megatron_opt.distributed import sharded_optimizer as optimizer_module
from megatron_opt.distributed.exchange import Exchange, Holdings
from megatron_opt.distributed.megatron_optimizer import MegatronShardedOptimizer
from megatron_opt.distributed.param_shards import ParamShard, rectangles
from megatron_opt.distributed.planning import Layout, _intervals
from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.engine_options import EngineOptions
from megatron_opt.kernels import dispatch, symmetric
from megatron_opt.layout.matrices import ParamView, split_param
from megatron_opt.layout.spec import ModelSpec
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import ParamGroupConfig, assign
from megatron_opt.optimizers.sharded_orthogonalization import _shares
from megatron_opt.platform.pretended_gpu import GPU, Count, pretended_gpu


class _Silence:
    """torch.distributed as a rank of `size` sees it, where nothing is sent."""

    def __init__(self, size: int, count: Count) -> None:
        self.size, self.count = size, count

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self, group: Any = None) -> int:
        return self.size

    def all_reduce(self, tensor: Any, group: Any = None) -> None:
        self._sent(tensor)

    def all_to_all_single(self, received: Any, message: Any, *rest: Any, **options: Any) -> Any:
        self._sent(message)
        return SimpleNamespace(wait=lambda: None)

    def _sent(self, tensor: Any) -> None:
        if tensor.device.type != "cuda":
            raise RuntimeError("a tensor on the CPU is given to a group of GPUs")
        self.count.launches["collective"] += 1


@dataclass
class Rehearsal:
    """A rank's optimizer, its parameters, and what is counted."""

    optimizer: MegatronShardedOptimizer
    params: list[torch.Tensor]
    count: Count

    def step(self) -> tuple[Count, float]:
        """One step's count and the seconds of the processor that it took, this counting included; gradients are fresh."""
        for param_shard in self.optimizer.param_shards():
            param_shard.view.param.main_grad.normal_()
        for name in ("waits", "launches"):
            getattr(self.count, name).clear()
        self.count.bytes = 0.0
        began = time.process_time()
        self.optimizer.step()
        seconds = time.process_time() - began
        counts = Count(+self.count.waits, +self.count.launches, self.count.bytes)
        return counts, seconds


def _views(model: ModelSpec, layout: Layout, tp_rank: int, bf16: bool) -> tuple[list[ParamView], dict[str, MatrixInfo]]:
    views, infos = [], {}
    for p in model.stages(1)[0][0]:
        shape = p.local_shape(layout.tp)
        made, pieces, rows, cols = split_param(
            p.name, shape, model.geometry, tp_rank=tp_rank, tp_size=layout.tp,
            partition_dim=p.cut if layout.tp > 1 else None,
        )  # fmt: skip
        infos.update({info.name: info for info in made})
        param = SimpleNamespace(shape=shape, dtype=torch.bfloat16 if bf16 else torch.float32)
        views.append(ParamView(p.name, param, rows, cols, pieces, False, p.cut is None or layout.tp == 1))  # type: ignore[arg-type]
    return views, infos


def _intervals_of(views: Sequence[ParamView], layout: Layout) -> list[list[tuple[int, int]]]:
    return _intervals([v.rows * v.cols for v in views], [False] * len(views), layout.dp, layout)


def _param_shards(views: Sequence[ParamView], mine: Sequence[tuple[int, int]]) -> list[ParamShard]:
    """Parameter shards with parameters and gradients on the current pretended GPU."""
    made: list[ParamShard] = []
    for view, (start, stop) in zip(views, mine, strict=True):
        dtype = view.param.dtype
        if start == stop:
            continue
        # only this rank's interval is allocated: a parameter's other elements are not touched by a step
        param = 0.02 * torch.randn(stop - start, device=GPU)
        shard = param.to(dtype)
        main = shard if dtype == torch.float32 else param
        stand_in = SimpleNamespace(dtype=dtype, data=shard, grad=None, main_grad=torch.randn(stop - start, device=GPU))
        flat = ParamView(view.name, stand_in, view.rows, view.cols, view.mappings, False, view.tp_replicated)  # type: ignore[arg-type]
        made.append(_Interval(flat, start, stop, main, rectangles(view, start, stop)))
    return made


class _Interval(ParamShard):
    """A parameter shard whose parameter is its interval alone."""

    def grad(self) -> torch.Tensor | None:
        return self.view.param.main_grad.float()  # type: ignore[attr-defined]

    def model_copy(self) -> torch.Tensor | None:
        param = self.view.param
        return None if param.dtype == torch.float32 else param.data


@contextmanager
def rehearsal(
    model: ModelSpec,
    layout: Layout,
    group_configs: Sequence[ParamGroupConfig],
    rank: int = 0,
    *,
    meta: bool = True,
    bf16: bool = True,
    native: bool = True,
    clip: float = 1.0,
    options: EngineOptions | None = None,
) -> Iterator[Rehearsal]:
    """A rank of a model on one pipeline stage; `native`: as with our CUDA kernels. On `meta` nothing is computed."""
    size = layout.tp * layout.dp
    holdings: list[Holdings] = [[] for _ in range(size)]
    infos: dict[str, MatrixInfo] = {}
    for tp_rank in range(layout.tp):
        views, made = _views(model, layout, tp_rank, bf16)
        infos.update(made)
        intervals = _intervals_of(views, layout)
        for replica, spans in enumerate(intervals):
            cut = [rectangles(v, *span) for v, span in zip(views, spans, strict=True) if span[0] < span[1]]
            holdings[replica * layout.tp + tp_rank] = [(i, rect) for i, rects in enumerate(cut) for rect in rects]
        if rank % layout.tp == tp_rank:
            mine = views, intervals[rank // layout.tp]
    groups = assign([infos[name] for name in sorted(infos)], group_configs)
    chunk = SimpleNamespace(
        ddp_config=SimpleNamespace(use_distributed_optimizer=layout.distributed, overlap_param_gather=True)
    )
    config = SimpleNamespace(lr=1e-3, weight_decay=0.1, clip_grad=clip, log_num_zeros_in_grad=False)
    with ExitStack() as stack:
        count = stack.enter_context(pretended_gpu(meta))
        silence = _Silence(size, count)
        for module in (shard_group_module, exchange_module, optimizer_module):
            stack.enter_context(mock.patch.object(module, "dist", silence))
        for module in (dispatch, symmetric):
            stack.enter_context(mock.patch.object(module, "native_available", lambda device="cpu": native))
        stack.enter_context(mock.patch.object(symmetric, "_library", lambda: None))  # Triton asks for a driver
        param_shards = _param_shards(*mine)
        shard_group = ShardGroup(
            "rehearsal", None, rank, size, param_shards, holdings, infos, Exchange(None, rank, size)
        )
        shard_group.instances = layout.instances
        shard_group.counted.fill_(1.0)  # one stage: every matrix counts once
        optimizer = MegatronShardedOptimizer(config, [chunk], [shard_group], groups, options)
        _shares.cache_clear()  # no tensor of another rehearsal, nor one of this in a run
        stack.callback(_shares.cache_clear)
        yield Rehearsal(optimizer, [param_shard.main for param_shard in param_shards], count)
