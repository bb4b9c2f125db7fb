"""From Megatron's model chunks and flags to the optimizer: declare, hold, agree, group, plan."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_opt.distributed import qk_clip
from megatron_opt.distributed.domain import Domain, agree, gather_objects, process_group
from megatron_opt.distributed.exchange import Exchange
from megatron_opt.distributed.fp8_weights import Fp8Weights
from megatron_opt.distributed.fragments import make_fragments
from megatron_opt.distributed.megatron_optimizer import MegatronShardedOptimizer
from megatron_opt.distributed.weight_average import WeightAverage
from megatron_opt.engine_options import EngineOptions
from megatron_opt.layout.matrices import declare
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import GroupRule, assign


def build_domains(chunks: Sequence[Any], distributed: bool, options: EngineOptions) -> list[Domain]:
    """This rank's domain of dense parameters and, where the model has experts, that of its experts."""
    from megatron.core import parallel_state as ps
    from megatron.core.utils import get_model_config, unwrap_model

    config = get_model_config(chunks[0])
    found = declare(unwrap_model(list(chunks)), config, per_head=options.split_heads)
    domains, instances = [], int(chunks[0].ddp_config.num_distributed_optimizer_instances)
    pp, ep = ps.get_pipeline_model_parallel_rank(), ps.get_expert_model_parallel_rank()
    for is_expert in (False, True):
        if is_expert and not config.num_moe_experts:
            continue
        views = [view for view in found.views if view.is_expert == is_expert]
        group, rank, size, _ = process_group((pp, ep) if is_expert else (pp,))
        fragments = make_fragments(views, list(chunks), distributed)
        mine = [(index, rect) for index, fragment in enumerate(fragments) for rect in fragment.rects]
        holdings = gather_objects(mine, group, size)
        names = {piece.matrix for view in views for piece in view.pieces}
        infos: dict[str, MatrixInfo] = {}
        for part in gather_objects({name: found.matrices[name] for name in names}, group, size):
            infos.update(part)
        name = f"experts of stage {pp}, expert rank {ep}" if is_expert else f"stage {pp}"
        trips = Exchange(group, rank, size, options.communication_dtype)
        fp8_weights = Fp8Weights.of(views, fragments, chunks, group)
        domains.append(Domain(name, group, rank, size, fragments, holdings, infos, trips, fp8_weights, instances))
    return domains


def all_matrices(domains: Sequence[Domain]) -> list[MatrixInfo]:
    """Logical matrices of the whole model in name order, known to every rank."""
    mine = {name: info for domain in domains if domain.rank == 0 for name, info in domain.infos.items()}
    merged: dict[str, MatrixInfo] = {}
    for part in gather_objects(mine, None, dist.get_world_size()):
        merged.update(part)
    return [merged[name] for name in sorted(merged)]


def model_matrices(chunks: Sequence[Any]) -> list[MatrixInfo]:
    """Logical matrices of the whole model, whatever optimizer trains it."""
    from megatron.core.utils import get_model_config, unwrap_model

    found = declare(unwrap_model(list(chunks)), get_model_config(chunks[0]))
    merged: dict[str, MatrixInfo] = {}
    for part in gather_objects(found.matrices, None, dist.get_world_size()):
        merged.update(part)
    return [merged[name] for name in sorted(merged)]


def build_optimizer(
    config: Any,
    chunks: Sequence[Any],
    rules: Sequence[GroupRule],
    options: EngineOptions | None = None,
    width_ratio: float | None = None,
) -> MegatronShardedOptimizer:
    """The optimizer for Megatron's (wrapped) model chunks with the given grouping."""
    from megatron.core.utils import get_model_config, unwrap_model

    options = options or EngineOptions()
    distributed = bool(chunks[0].ddp_config.use_distributed_optimizer)
    domains = build_domains(chunks, distributed, options)
    groups = assign(all_matrices(domains), rules, options.decay_mode, width_ratio)
    optimizer = MegatronShardedOptimizer(config, chunks, domains, groups, options)
    for domain, step in zip(domains, optimizer.matrix_steps, strict=True):
        agree(f"optimizer plan of {domain.name}", step.placed.plan.digest(), domain.group, domain.size)
    keeps_norm = {
        info.name for group, rule in zip(groups, optimizer.rules, strict=True) if rule.projects for info in group.infos
    }
    model, model_config = unwrap_model(list(chunks)), get_model_config(chunks[0])
    if clip := qk_clip.make(model, domains, keeps_norm, model_config, options.split_heads):
        optimizer.post_steps.append(clip)
    if options.ema_decay:  # of the clipped weights
        optimizer.average = WeightAverage(domains, options.ema_decay)
        optimizer.post_steps.append(optimizer.average)
    optimizer.publish_fp8()
    return optimizer
