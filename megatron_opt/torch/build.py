"""From named torch parameters to the engine's shard group: declare, hold, agree."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_opt.distributed.exchange import Exchange
from megatron_opt.distributed.param_shards import rectangles
from megatron_opt.distributed.shard_group import ShardGroup, agree, gather_objects, refused_alike
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.layout.matrices import ParamView
from megatron_opt.optimizers.base import MatrixOptimizer
from megatron_opt.optimizers.groups import Group
from megatron_opt.optimizers.registry import known
from megatron_opt.torch.matrices import Declared, Declarer
from megatron_opt.torch.shards import TensorShard, check_parameters, local_axes


@dataclass
class Source:
    """Parameters in their order, what each declares, and the shard group that they make."""

    named: list[tuple[str, Any]]
    declared: list[Declared]
    shard_group: ShardGroup

    @property
    def param_of(self) -> dict[str, str]:
        """Name of a logical matrix -> its parameter's."""
        return {info.name: each.name for each in self.declared for info in each.infos}


def ranks_of(group: Any) -> tuple[Any, int, int]:
    """The ranks that share the parameters, this one's place among them, and their number; one process needs no group."""
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise UserError("process_group is given, but torch.distributed is not initialized; leave it out.")
        return None, 0, 1
    group = group or dist.group.WORLD
    rank = dist.get_rank(group)
    if rank < 0:
        raise UserError("this rank is not in process_group, whose ranks share the parameters.")
    return group, rank, dist.get_world_size(group)


def build_source(
    named: list[tuple[str, Any]], declarer: Declarer, options: EngineOptions, process_group: Any
) -> Source:
    """Declare the parameters and find who holds what of them; collective over the group."""
    group, rank, size = ranks_of(process_group)
    with refused_alike(group, size):
        device, declared, param_shards = _declare(named, declarer)
    what = str([(each.name, each.shape, each.infos) for each in declared]).encode()
    agree("names, shapes and matrices of the parameters", hashlib.sha256(what).hexdigest()[:16], group, size)
    mine = [(index, rect) for index, param_shard in enumerate(param_shards) for rect in param_shard.rects]
    infos = {info.name: info for each in declared for info in each.infos}
    if len(infos) != sum(len(each.infos) for each in declared):
        raise UserError("two matrices have the same name; give the suffixes of split other names.")
    exchange = Exchange(group, rank, size, options.communication_dtype, device)
    holdings = gather_objects(mine, group, size)
    try:
        shard_group = ShardGroup(
            "the model", group, rank, size, list(param_shards), holdings, infos, exchange, own_device=device
        )
    except RuntimeError as error:
        raise UserError(f"{error}; shard a parameter alike on all ranks of process_group.") from error
    return Source(named, declared, shard_group)


def _declare(
    named: list[tuple[str, Any]], declarer: Declarer
) -> tuple[torch.device, list[Declared], list[TensorShard]]:
    """The device of the parameters, their declarations, and this rank's parameter shards."""
    device = check_parameters(named)
    declared = [declarer.declare(name, param) for name, param in named]
    declarer.finish()
    param_shards = []
    for each, (name, param) in zip(declared, named, strict=True):
        mappings, rows, cols = each.mappings(local_axes(name, param))
        if mappings:
            view = ParamView(name, param, rows, cols, mappings, False, False)
            param_shards.append(TensorShard.of(view, rectangles(view, 0, rows * cols)))
    return device, declared, param_shards


def check_groups(source: Source, groups: Sequence[Group]) -> None:
    """Refuse a matrix rule on what nobody has said is a matrix."""
    optimizers = {info.name: group.optimizer for group in groups for info in group.infos}
    for each in source.declared:
        if each.guessed and issubclass(known(optimizers[each.infos[0].name]), MatrixOptimizer):
            raise UserError(
                f"{each.name} has {len(each.shape)} sides {list(each.shape)}, and {optimizers[each.infos[0].name]} trains matrices; "
                f"say split={{{each.name!r}: 'stack'}} (a matrix of the last two sides for each of the others) or 'flatten'."
            )


def check_replicas(shard_group: ShardGroup) -> None:
    """Refuse gradients that differ between ranks that hold the same: nobody has averaged them. Collective."""
    shared = []
    for param_shard in shard_group.param_shards:
        grad = param_shard.grad()
        for rect in param_shard.rects:
            if shard_group.weight[rect.key] < 1.0:
                size = 0.0 if grad is None else float(torch.linalg.vector_norm(rect.run(grad).double()))
                shared.append((rect.key, size))
    sums: dict[Any, float] = {}
    for rank, theirs in enumerate(gather_objects(shared, shard_group.group, shard_group.size)):
        for key, size in theirs:
            other = sums.setdefault(key, size)
            if abs(size - other) > 1e-3 * max(size, other):
                raise UserError(
                    f"rank {rank} has another gradient of {key[0]} than other ranks that hold the same of it; wrap the model "
                    "in DistributedDataParallel or fully_shard, or name the ranks that train together (process_group)."
                )
