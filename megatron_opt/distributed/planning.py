"""The optimizer's plan for a cluster that one does not have: shapes and a layout in, parts, FLOPs and bytes by rank out.

The same packing and the same routes as in a run, from what every rank of one pipeline stage would hold; nothing is
allocated and no process group is needed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_opt.distributed.compute_shards import ComputeShard, Submatrix, submatrices_of
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.meta_model import model_config, stage_parameters
from megatron_opt.distributed.ownership import Plan, make_buckets, pack_instances, plan_table
from megatron_opt.distributed.param_shards import Rect, rectangles
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.matrices import ParamView, split_param
from megatron_opt.layout.parameter import Parameter
from megatron_opt.layout.region import Region
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.groups import ParamGroupConfig, assign


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; `dp` counts data- and context-parallel ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    virtual: int = 1
    distributed: bool = False  # Megatron's distributed optimizer
    instances: int = 1  # of it: each holds everything
    bucket_size: int | None = None  # of its gradient buffers, in elements

    @property
    def experts_apart(self) -> bool:
        """Whether experts have process groups of their own, as Megatron decides it."""
        return self.ep > 1 or self.etp != self.tp


@dataclass
class ShardGroupPlan:
    """One shard group: the packing, and bytes that each rank sends in a step, by what they are for."""

    name: str
    plan: Plan
    sent: dict[str, list[float]]

    def sent_by_rank(self) -> dict[int, float]:
        """All that a rank sends in a step."""
        return {rank: sum(values[rank] for values in self.sent.values()) for rank in range(len(self.plan.load))}


def _intervals(numels: Sequence[int], split: Sequence[bool], ranks: int, layout: Layout) -> list[list[tuple[int, int]]]:
    """By data-parallel rank and parameter: what Megatron's reduce-scatter leaves there."""
    if not layout.distributed:
        return [[(0, numel) for numel in numels]] * ranks
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    ranks //= layout.instances
    params = [torch.nn.Parameter(torch.empty(numel, device="meta"), requires_grad=False) for numel in numels]
    for param, own in zip(params, split, strict=True):
        param.shared_embedding = own  # type: ignore[attr-defined]
    ddp = SimpleNamespace(pad_buckets_for_high_nccl_busbw=False)
    laid = DistributedOptimizer._compute_per_buffer_param_layout(params, layout.bucket_size, ranks, ddp)
    intervals = []
    for rank in range(ranks):
        mine = []
        for param in params:
            first, last, bucket = laid.param_index_map[param]
            low, high = laid.bucket_indices[bucket]
            shard = (high - low) // ranks
            start, stop = max(first, low + rank * shard), min(last, low + (rank + 1) * shard)
            mine.append((start - first, stop - first) if start < stop else (0, 0))
        intervals.append(mine)
    return intervals * layout.instances


# A place and the ranks that hold it.
Holders = dict[str, list[tuple[Rect, list[int]]]]


def _holdings(
    chunks: Sequence[Sequence[Parameter]], layout: Layout, geometry: Geometry, expert: int | None, experts: int
) -> tuple[Holders, dict[str, MatrixInfo], int]:
    """Who holds what in a shard group; ranks count tensor-parallel first, as Megatron's do."""
    is_expert = expert is not None
    tp = layout.etp if is_expert else layout.tp
    replicas = layout.dp * layout.tp // (layout.ep * layout.etp) if is_expert else layout.dp
    holders_of: dict[str, dict[Region, tuple[Rect, list[int]]]] = {}
    infos: dict[str, MatrixInfo] = {}

    def shard_group_of(p: Parameter) -> int | None:
        return p.expert * layout.ep // experts if p.expert is not None and layout.experts_apart else None

    for chunk in chunks:
        mine = [p for p in chunk if shard_group_of(p) == expert]
        numels = [math.prod(p.local_shape(tp)) for p in mine]
        # Megatron gives an embedding that stages share a bucket of its own
        intervals = _intervals(numels, [p.copy for p in mine], replicas, layout)
        for rank in range(tp):
            views = []
            for p in mine:
                shape = p.local_shape(tp)
                made, pieces, rows, cols = split_param(
                    p.name, shape, geometry, tp_rank=rank, tp_size=tp, partition_dim=p.cut if tp > 1 else None
                )
                infos.update({info.name: info for info in made})
                views.append(ParamView(p.name, torch.empty(0), rows, cols, pieces, is_expert, p.cut is None or tp == 1))
            groups: dict[tuple[int, tuple[int, int]], list[int]] = {}
            for replica in range(replicas):
                for index, interval in enumerate(intervals[replica]):
                    if interval[0] < interval[1]:
                        groups.setdefault((index, interval), []).append(replica * tp + rank)
            for (index, (start, stop)), holders in groups.items():
                for rect in rectangles(views[index], start, stop):
                    entry = holders_of.setdefault(rect.matrix, {}).setdefault(rect.region, (rect, []))
                    entry[1].extend(holders)
    listed = {
        name: [(rect, sorted(ranks)) for rect, ranks in ranks_of_rect.values()]
        for name, ranks_of_rect in holders_of.items()
    }
    return listed, infos, tp * replicas


def _sent(
    holders_of: Holders,
    plan: Plan,
    optimizers: dict[str, Any],
    infos: dict[str, MatrixInfo],
    buckets: Sequence[Sequence[str]],
    width: int,
    near: int,
) -> dict[str, list[float]]:
    """Bytes that each rank sends in a step, as the run's counters name them; those of the first instance stand for all
    where each follows the plan by itself. `near`: ranks of an instance.
    """
    ranks = len(plan.load)
    kinds = ("gradients to owners", "updates to shards", "between shards")
    sent = {kind: [0.0] * ranks for kind in kinds}
    parts: dict[str, list[ComputeShard]] = {}
    for part in plan.parts:
        parts.setdefault(part.matrix, []).append(part)
    for name, mine in parts.items():
        for rect, holding in holders_of[name]:
            holders, region = [rank for rank in holding if rank < ranks], rect.region
            among = set(holders)
            for part in mine:
                common = part.bounds.intersect(region)
                if common is None:
                    continue
                count, own = common.numel * width, part.rank in among
                if not own:
                    around = [rank for rank in holders if rank // near == part.rank // near]
                    sent["gradients to owners"][around[part.rank % len(around)]] += count
                sent["updates to shards"][part.rank] += count * (len(holders) - own)
    submatrices: dict[str, list[Submatrix]] = {}
    for submatrix in submatrices_of(plan.parts):
        submatrices.setdefault(submatrix.key[0], []).append(submatrix)
    for bucket in buckets:
        for submatrix in (submatrix for name in bucket for submatrix in submatrices[name] if len(submatrix.parts) > 1):
            partition = optimizers[submatrix.key[0]].partition(submatrix.info(infos[submatrix.key[0]]))
            for collective in partition.collectives(submatrix.edges):
                for index, part in enumerate(submatrix.parts):
                    sent["between shards"][part.rank] += collective.sent_bytes(index)
    return sent


def sent_in_a_step(shard_group: Any, step: Any) -> dict[str, list[float]]:
    """The same of a run's shard group and its matrix step."""
    holders_of: dict[str, dict[Region, tuple[Rect, list[int]]]] = {}
    for rank, rects in enumerate(shard_group.holdings):
        for _, rect in rects:
            if rect.matrix in step.infos:
                holders_of.setdefault(rect.matrix, {}).setdefault(rect.region, (rect, []))[1].append(rank)
    holders = {name: list(each.values()) for name, each in holders_of.items()}
    width, near = shard_group.exchange.dtype.itemsize, shard_group.size // shard_group.instances
    return _sent(holders, step.placed.plan, step.optimizers, step.infos, step.placed.buckets, width, near)


def plan_model(
    stages: Mapping[int, Sequence[Sequence[Parameter]]],
    geometry: Geometry,
    layout: Layout,
    group_configs: Sequence[ParamGroupConfig],
    options: EngineOptions | None = None,
    which: Sequence[int] | None = None,
) -> list[ShardGroupPlan]:
    """Plans of the shard groups of the stages in `which` (all by default), in the order in which a run makes them.

    `stages` has the chunks of every pipeline stage, each a list of whole parameters in Megatron's order.
    """
    options, whole = options or EngineOptions(), dict[str, MatrixInfo]()
    for p in (p for chunks in stages.values() for chunk in chunks for p in chunk):
        made, *_ = split_param(p.name, p.shape, geometry, tp_rank=0, tp_size=1, partition_dim=None)
        whole.update({info.name: info for info in made})
    experts = 1 + max(
        (p.expert for chunks in stages.values() for chunk in chunks for p in chunk if p.expert is not None), default=-1
    )
    groups = assign([whole[name] for name in sorted(whole)], group_configs)
    built = [registry.build(group.optimizer, dict(group.options)) for group in groups]
    optimizer_of = {
        info.name: optimizer for group, optimizer in zip(groups, built, strict=True) for info in group.infos
    }
    width, plans = options.communication_dtype.itemsize, []
    for stage in sorted(stages) if which is None else which:
        shard_groups: list[int | None] = [None, *(range(layout.ep) if experts else [])]
        for expert in shard_groups:
            holders_of, infos, ranks = _holdings(stages[stage], layout, geometry, expert, experts)
            taken = {name: infos[name] for name in sorted(infos) if isinstance(optimizer_of[name], MatrixOptimizer)}
            jobs = [Job.of(info, optimizer_of[name]) for name, info in taken.items()]
            plan = pack_instances(jobs, ranks, layout.instances, options)
            buckets = make_buckets(plan.parts, ranks // plan.instances, options.bucket_bytes, width)
            name = f"stage {stage}" if expert is None else f"experts of stage {stage}, expert rank {expert}"
            sent = _sent(holders_of, plan, optimizer_of, taken, buckets, width, ranks // layout.instances)
            plans.append(ShardGroupPlan(name, plan, sent))
    return plans


def from_args(
    args: Any, world: int, group_configs: Sequence[ParamGroupConfig], which: Sequence[int] | None = None
) -> list[ShardGroupPlan]:
    """Plans for Megatron flags as `world` ranks would make them, from Megatron's own model on the `meta` device."""
    options = EngineOptions.of(vars(args))
    tp, pp, ep = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size
    if world % (tp * pp):
        raise UserError(f"{world} ranks are not divisible by tensor parallelism {tp} × pipeline parallelism {pp}.")
    dp = world // (tp * pp)
    layout = Layout(
        tp,
        pp,
        dp,
        ep,
        getattr(args, "expert_tensor_parallel_size", None) or tp,
        virtual=getattr(args, "virtual_pipeline_model_parallel_size", None) or 1,
        distributed=args.use_distributed_optimizer,
        instances=args.num_distributed_optimizer_instances,
        bucket_size=max(40_000_000, 1_000_000 * dp) if args.overlap_grad_reduce and pp == 1 else None,
    )
    return plan_model(
        {stage: stage_parameters(args, stage) for stage in range(pp)},
        Geometry.of(model_config(args).transformer, options.split_heads),
        layout,
        group_configs,
        options,
        which,
    )


def show(plans: Sequence[ShardGroupPlan], folder: str | None = None) -> None:
    """Print tables, and leave `optimizer_plan.DOMAIN.json` with owner and shards of every matrix in a folder."""
    for group_plan in plans:
        sent = group_plan.sent_by_rank()
        print(plan_table(group_plan.plan, sent, title=f"optimizer plan, {group_plan.name}"), flush=True)
        if not folder:
            continue
        plan = group_plan.plan
        content = {
            "shard_group": group_plan.name,
            "digest": plan.digest(),
            "flops": plan.flops,
            "state_bytes": plan.state_bytes,
            "state_bytes_on_host": [plan.offloaded * size for size in plan.state_bytes],
            "load": plan.load,
            "imbalance": plan.imbalance(),
            "instances": plan.instances,
            "sent_bytes": group_plan.sent,
            "parts": [[p.matrix, p.rank, *p.bounds] for p in plan.parts],  # rows, columns
        }
        path = Path(folder) / f"optimizer_plan.{group_plan.name.replace(' ', '_').replace(',', '')}.json"
        write_atomic(path, json.dumps(content))
