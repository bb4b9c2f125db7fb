"""The optimizer's own plan for a layout: the rules' `cost()` and the engine's packing, group by group."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_opt import quiet
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model, Parameter
from megatron_opt.distributed import planning
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.ownership import Plan, make_buckets, pack_instances
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.groups import Group, ParamGroupConfig, assign

ROUTED = 1024  # ranks of a shard group up to which routes are followed: beyond, that takes longer than a command should


@dataclass
class Elements:
    """Parameters that one element-wise rule trains: elements that tensor parallelism cuts, and those it copies."""

    optimizer: Any
    cut: int = 0
    copied: int = 0
    shards: int = 0
    largest: float = 0.0  # elements of one of them on a tensor-parallel rank


@dataclass
class ShardGroupPlan:
    """One shard group of ranks: who owns which matrix, and the elements of element-wise rules."""

    name: str
    ranks: int
    tp: int
    data: int  # ranks over which the distributed optimizer cuts
    plan: Plan
    optimizers: dict[str, Any]
    infos: dict[str, MatrixInfo]
    costs: dict[str, Cost]
    buckets: int
    elements: list[Elements] = field(default_factory=list)
    parameters: int = 0  # of the whole shard group
    local_elements: float = 0.0  # of one rank, replicas of tensor parallelism included
    quantized: float = 0.0  # of those, the weights of FP8 products
    scales: float = 0.0  # bytes of their scales
    param_shards: int = 0  # parameter shards that one rank holds at most
    sent: dict[str, float] | None = None  # bytes of the rank that sends most, where the engine's routes were asked for

    @property
    def matrix_numel(self) -> float:
        """Elements of all matrices that have owners."""
        return float(sum(info.numel for info in self.infos.values()))


def plans(
    model: Model,
    layout: Layout,
    grouping: Sequence[ParamGroupConfig],
    decay_mode: str = "decoupled",
    exact: bool = False,
) -> list[list[ShardGroupPlan]]:
    """Shard groups of every pipeline stage: dense parameters, then the experts of one expert-parallel rank.

    Stages of equal shape share one plan, and so do all expert-parallel ranks of a stage. `exact` follows the engine's
    routes for the traffic of dense parameters, up to `ROUTED` ranks.
    """
    stages = layout.stages(model)
    local = range(model.experts // layout.ep) if model.experts else range(0)
    by_stage = [model.parameters(first, last, local, copy=True) for first, last in stages]
    seen: dict[str, MatrixInfo] = {}
    for parameters in by_stage:
        for parameter in parameters:
            for info in model.infos(parameter):
                seen.setdefault(info.name, info)
    groups = assign([seen[name] for name in sorted(seen)], grouping, decay_mode)
    group_of = {info.name: group for group in groups for info in group.infos}
    optimizers = {group.name: registry.build(group.optimizer, dict(group.options)) for group in groups}
    known: dict[tuple[Any, ...], list[ShardGroupPlan]] = {}
    planned = []
    for (first, last), parameters in zip(stages, by_stage, strict=True):
        symbols = tuple(model.symbol(layer) for layer in range(first, last)) if model.pattern else ()
        key = (
            last - first,
            first == 0,
            last == model.layers,
            len(model.expert_layers & set(range(first, last))),
            symbols,
            _kept(model, layout, first, last),
        )
        if key not in known:
            known[key] = _stage(model, layout, parameters, group_of, optimizers, f"layers {first} to {last - 1}")
            dense = known[key][0]
            # the engine cuts stages evenly: uneven ones keep the estimate
            if exact and not layout.split and dense.infos and 1 < dense.ranks <= ROUTED:
                dense.sent = _sent(model, layout, grouping, stages.index((first, last)))
        planned.append(known[key])
    return planned


def _kept(model: Model, layout: Layout, first: int, last: int) -> tuple[bool, ...]:
    """Which layers of a stage have products in FP8, where only some have."""
    if layout.fp8 is None or not (layout.fp8.first or layout.fp8.last):
        return ()
    return tuple(layout.fp8.quantizes(layer, model.layers) for layer in range(first, last))


def _sent(model: Model, layout: Layout, grouping: Sequence[ParamGroupConfig], stage: int) -> dict[str, float]:
    """Bytes that the fullest sender of a stage's dense parameters sends in a step, along the engine's own routes."""
    replicas = layout.data_parallel * layout.cp
    bucket = max(40_000_000, 1_000_000 * replicas) if layout.overlap_grad_reduce and layout.pp == 1 else None
    sizes = planning.Layout(
        layout.tp, layout.pp, replicas, layout.ep, layout.etp,
        distributed=layout.distributed, instances=layout.instances, bucket_size=bucket,
    )  # fmt: skip
    stages = {
        index: [[p for p in model.parameters(*edges, copy=True) if p.expert is None or not sizes.experts_apart]]
        for index, edges in enumerate(layout.stages(model))
    }
    with quiet.quieted():
        plan, *_ = planning.plan_model(
            stages, model.geometry, sizes, _without_experts(grouping), layout.engine, [stage]
        )  # fmt: skip
    totals = plan.sent_by_rank()
    fullest = max(totals, key=lambda rank: totals[rank])
    return {kind: values[fullest] for kind, values in plan.sent.items() if values[fullest]}


def _without_experts(grouping: Sequence[ParamGroupConfig]) -> list[ParamGroupConfig]:
    """The same rules, which may now match nothing: the experts are left out."""
    return [replace(group_config, optional=True) for group_config in grouping]


def _stage(
    model: Model,
    layout: Layout,
    parameters: Sequence[Parameter],
    group_of: dict[str, Group],
    optimizers: dict[str, Any],
    name: str,
) -> list[ShardGroupPlan]:
    apart = layout.ep > 1 or layout.etp != layout.tp  # as Megatron decides whether experts have groups of their own
    dense = [p for p in parameters if p.expert is None or not apart]
    experts = [p for p in parameters if p.expert is not None and apart]
    shard_groups = [_shard_group(model, layout, dense, group_of, optimizers, name, layout.dense_ranks, layout.tp)]
    if experts:
        title = f"experts of {name}"
        shard_groups.append(
            _shard_group(model, layout, experts, group_of, optimizers, title, layout.expert_ranks, layout.etp)
        )
    return shard_groups


def _shard_group(
    model: Model,
    layout: Layout,
    parameters: Sequence[Parameter],
    group_of: dict[str, Group],
    optimizers: dict[str, Any],
    name: str,
    ranks: int,
    tp: int,
) -> ShardGroupPlan:
    infos: dict[str, MatrixInfo] = {}
    matrix_optimizers: dict[str, Any] = {}
    elements: dict[str, Elements] = {}
    kept_elements, param_shards = 0.0, 0
    quantized, scales, fp8 = 0.0, 0.0, layout.fp8
    for parameter in parameters:
        kept_elements += parameter.local_elements(tp)
        matrices = model.infos(parameter)
        if fp8 is not None and fp8.covers(matrices[0].kind, parameter.shape, parameter.layer, model.layers):
            quantized += parameter.local_elements(tp)
            scales += fp8.scale_bytes(
                [-(-n // (tp if i == parameter.cut else 1)) for i, n in enumerate(parameter.shape)]
            )
        for info in matrices:
            group = group_of[info.name]
            optimizer = optimizers[group.name]
            param_shards += 1
            if isinstance(optimizer, MatrixOptimizer):
                infos[info.name], matrix_optimizers[info.name] = info, optimizer
                continue
            entry = elements.setdefault(group.name, Elements(optimizer))
            entry.shards += 1
            entry.largest = max(entry.largest, info.numel / (tp if parameter.cut is not None else 1))
            if parameter.cut is not None:
                entry.cut += info.numel
            else:
                entry.copied += info.numel
    costs = {key: _cost(matrix_optimizers[key], info) for key, info in infos.items()}
    jobs = [Job.of(info, matrix_optimizers[key], costs[key]) for key, info in infos.items()]
    plan = pack_instances(jobs, ranks, layout.instances, layout.engine)
    buckets = len(
        make_buckets(plan.parts, ranks // plan.instances, layout.engine.bucket_bytes, layout.communication_bytes)
    )
    data = max(1, ranks // tp // layout.instances)
    return ShardGroupPlan(
        name,
        ranks,
        tp,
        data,
        plan,
        matrix_optimizers,
        infos,
        costs,
        buckets,
        list(elements.values()),
        sum(p.numel for p in parameters),
        kept_elements,
        quantized,
        scales,
        -(-param_shards // data) + 2 if layout.distributed else param_shards,
    )


def likeness(optimizer: Any, info: MatrixInfo) -> tuple[Any, ...]:
    """Equal for matrices that cost a rule the same."""
    return id(optimizer), info.shape, info.kind, info.role, info.heads


def _cost(optimizer: Any, info: MatrixInfo) -> Cost:
    key = likeness(optimizer, info)
    if key not in _costs:
        if len(_costs) > 4096:
            _costs.clear()
        _costs[key] = (optimizer, optimizer.cost(info))  # the rule is kept so that its id stays its own
    return _costs[key][1]


_costs: dict[tuple[Any, ...], tuple[Any, Cost]] = {}
