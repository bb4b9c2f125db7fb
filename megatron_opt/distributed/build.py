"""From Megatron's model chunks and flags to the optimizer: declare, hold, agree, group, plan."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_opt.distributed import qk_clip
from megatron_opt.distributed.exchange import Exchange
from megatron_opt.distributed.fp8_weights import Fp8Weights
from megatron_opt.distributed.megatron_optimizer import MegatronShardedOptimizer
from megatron_opt.distributed.param_shards import make_param_shards
from megatron_opt.distributed.shard_group import ShardGroup, agree, gather_objects, process_group, refused_alike
from megatron_opt.distributed.weight_average import WeightAverage
from megatron_opt.engine_options import EngineOptions
from megatron_opt.layout.matrices import declare
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import ParamGroupConfig, assign


def build_shard_groups(chunks: Sequence[Any], distributed: bool, options: EngineOptions) -> list[ShardGroup]:
    """This rank's shard group of dense parameters and, where the model has experts, that of its experts."""
    from megatron.core import parallel_state as ps
    from megatron.core.utils import get_model_config, unwrap_model

    config = get_model_config(chunks[0])
    with refused_alike(None, dist.get_world_size()):  # a stage may have layers that others do not
        declaration = declare(unwrap_model(list(chunks)), config, per_head=options.split_heads)
    shard_groups, instances = [], int(chunks[0].ddp_config.num_distributed_optimizer_instances)
    pp, ep = ps.get_pipeline_model_parallel_rank(), ps.get_expert_model_parallel_rank()
    for is_expert in (False, True):
        if is_expert and not config.num_moe_experts:
            continue
        views = [view for view in declaration.views if view.is_expert == is_expert]
        group, rank, size, _ = process_group((pp, ep) if is_expert else (pp,))
        param_shards = make_param_shards(views, list(chunks), distributed)
        mine = [(index, rect) for index, param_shard in enumerate(param_shards) for rect in param_shard.rects]
        holdings = gather_objects(mine, group, size)
        names = {mapping.matrix for view in views for mapping in view.mappings}
        infos: dict[str, MatrixInfo] = {}
        for part in gather_objects({name: declaration.matrices[name] for name in names}, group, size):
            infos.update(part)
        name = f"experts of stage {pp}, expert rank {ep}" if is_expert else f"stage {pp}"
        exchange = Exchange(group, rank, size, options.communication_dtype)
        fp8_weights = Fp8Weights.of(views, param_shards, chunks, group)
        shard_groups.append(
            ShardGroup(name, group, rank, size, param_shards, holdings, infos, exchange, fp8_weights, instances)
        )
    return shard_groups


def all_matrices(shard_groups: Sequence[ShardGroup]) -> list[MatrixInfo]:
    """Logical matrices of the whole model in name order, known to every rank."""
    mine = {
        name: info for shard_group in shard_groups if shard_group.rank == 0 for name, info in shard_group.infos.items()
    }
    merged: dict[str, MatrixInfo] = {}
    for part in gather_objects(mine, None, dist.get_world_size()):
        merged.update(part)
    return [merged[name] for name in sorted(merged)]


def model_matrices(chunks: Sequence[Any]) -> list[MatrixInfo]:
    """Logical matrices of the whole model, whatever optimizer trains it."""
    from megatron.core.utils import get_model_config, unwrap_model

    declaration = declare(unwrap_model(list(chunks)), get_model_config(chunks[0]))
    merged: dict[str, MatrixInfo] = {}
    for part in gather_objects(declaration.matrices, None, dist.get_world_size()):
        merged.update(part)
    return [merged[name] for name in sorted(merged)]


def build_optimizer(
    config: Any,
    chunks: Sequence[Any],
    group_configs: Sequence[ParamGroupConfig],
    options: EngineOptions | None = None,
    width_ratio: float | None = None,
) -> MegatronShardedOptimizer:
    """The optimizer for Megatron's (wrapped) model chunks with the given grouping."""
    from megatron.core.utils import get_model_config, unwrap_model

    options = options or EngineOptions()
    distributed = bool(chunks[0].ddp_config.use_distributed_optimizer)
    shard_groups = build_shard_groups(chunks, distributed, options)
    groups = assign(all_matrices(shard_groups), group_configs, options.decay_mode, width_ratio)
    optimizer = MegatronShardedOptimizer(config, chunks, shard_groups, groups, options)
    for shard_group, step in zip(shard_groups, optimizer.matrix_steps, strict=True):
        agree(f"optimizer plan of {shard_group.name}", step.placed.plan.digest(), shard_group.group, shard_group.size)
    keeps_norm = {
        info.name
        for group, group_config in zip(groups, optimizer.group_optimizers, strict=True)
        if group_config.projects
        for info in group.infos
    }
    model, model_config = unwrap_model(list(chunks)), get_model_config(chunks[0])
    if clip := qk_clip.make(model, shard_groups, keeps_norm, model_config, options.split_heads):
        optimizer.post_steps.append(clip)
    if options.ema_decay:  # of the clipped weights
        optimizer.average = WeightAverage(shard_groups, options.ema_decay)
        optimizer.post_steps.append(optimizer.average)
    optimizer.publish_fp8()
    return optimizer
