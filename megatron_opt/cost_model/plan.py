"""The optimizer's own plan for a layout: the rules' `cost()` and the engine's packing, domain by domain."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model, Parameter
from megatron_opt.distributed.ownership import Job, Plan, make_buckets, pack
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.groups import Group, GroupRule, assign


@dataclass
class Elements:
    """Parameters that one element-wise rule trains: elements that tensor parallelism cuts, and those it copies."""

    rule: Any
    cut: int = 0
    copied: int = 0
    pieces: int = 0


@dataclass
class DomainPlan:
    """One domain of ranks: who owns which matrix, and the elements of element-wise rules."""

    name: str
    ranks: int
    tp: int
    data: int  # ranks over which the distributed optimizer cuts
    plan: Plan
    rules: dict[str, Any]
    infos: dict[str, MatrixInfo]
    costs: dict[str, Cost]
    buckets: int
    elements: list[Elements] = field(default_factory=list)
    parameters: int = 0  # of the whole domain
    held: float = 0.0  # of one rank, replicas of tensor parallelism included
    fragments: int = 0  # logical pieces that one rank holds at most

    @functools.cached_property
    def slices(self) -> dict[str, int]:
        """Parts that each matrix is cut into."""
        found: dict[str, int] = {}
        for part in self.plan.parts:
            found[part.matrix] = found.get(part.matrix, 0) + 1
        return found

    @property
    def matrix_numel(self) -> float:
        """Elements of all matrices that have owners."""
        return float(sum(_numel(info.shape) for info in self.infos.values()))


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def plans(
    model: Model, layout: Layout, grouping: Sequence[GroupRule], decay_mode: str = "decoupled"
) -> list[list[DomainPlan]]:
    """Domains of every pipeline stage: dense parameters, then the experts of one expert-parallel rank.

    Stages of equal shape share one plan, and so do all expert-parallel ranks of a stage.
    """
    stages = layout.stages(model)
    local = range(model.experts // layout.ep) if model.experts else range(0)
    held = [model.parameters(first, last, local, copy=True) for first, last in stages]
    seen: dict[str, MatrixInfo] = {}
    for parameters in held:
        for parameter in parameters:
            for info in model.infos(parameter):
                seen.setdefault(info.name, info)
    groups = assign([seen[name] for name in sorted(seen)], grouping, decay_mode)
    group_of = {info.name: group for group in groups for info in group.infos}
    rules = {group.name: registry.build(group.optimizer, dict(group.options)) for group in groups}
    known: dict[tuple[Any, ...], list[DomainPlan]] = {}
    found = []
    for (first, last), parameters in zip(stages, held, strict=True):
        key = (last - first, first == 0, last == model.layers, len(model.expert_layers & set(range(first, last))))
        if key not in known:
            known[key] = _stage(model, layout, parameters, group_of, rules, f"layers {first} to {last - 1}")
        found.append(known[key])
    return found


def _stage(
    model: Model,
    layout: Layout,
    parameters: Sequence[Parameter],
    group_of: dict[str, Group],
    rules: dict[str, Any],
    name: str,
) -> list[DomainPlan]:
    dense = [p for p in parameters if p.expert is None]
    experts = [p for p in parameters if p.expert is not None]
    found = [_domain(model, layout, dense, group_of, rules, name, layout.dense_ranks, layout.tp)]
    if experts:
        title = f"experts of {name}"
        found.append(_domain(model, layout, experts, group_of, rules, title, layout.expert_ranks, layout.etp))
    return found


def _domain(
    model: Model,
    layout: Layout,
    parameters: Sequence[Parameter],
    group_of: dict[str, Group],
    rules: dict[str, Any],
    name: str,
    ranks: int,
    tp: int,
) -> DomainPlan:
    infos: dict[str, MatrixInfo] = {}
    matrix_rules: dict[str, Any] = {}
    elements: dict[str, Elements] = {}
    held, fragments = 0.0, 0
    for parameter in parameters:
        held += parameter.numel / (tp if parameter.cut is not None else 1)
        for info in model.infos(parameter):
            group = group_of[info.name]
            rule = rules[group.name]
            fragments += 1
            if isinstance(rule, MatrixOptimizer):
                infos[info.name], matrix_rules[info.name] = info, rule
                continue
            entry = elements.setdefault(group.name, Elements(rule))
            entry.pieces += 1
            if parameter.cut is not None:
                entry.cut += _numel(info.shape)
            else:
                entry.copied += _numel(info.shape)
    costs = {key: _cost(matrix_rules[key], info) for key, info in infos.items()}
    jobs = [Job.of(info, matrix_rules[key], costs[key]) for key, info in infos.items()]
    plan = pack(jobs, ranks, layout.matrix_mode)
    buckets = len(make_buckets(plan.parts, ranks, layout.bucket_bytes, layout.wire_bytes))
    data = max(1, ranks // tp)
    return DomainPlan(
        name,
        ranks,
        tp,
        data,
        plan,
        matrix_rules,
        infos,
        costs,
        buckets,
        list(elements.values()),
        sum(p.numel for p in parameters),
        held,
        -(-fragments // data) + 2 if layout.distributed else fragments,
    )


def _cost(rule: Any, info: MatrixInfo) -> Cost:
    key = (id(rule), info.shape, info.kind, info.role, info.heads)
    if key not in _costs:
        if len(_costs) > 4096:
            _costs.clear()
        _costs[key] = (rule, rule.cost(info))  # the rule is kept so that its id stays its own
    return _costs[key][1]


_costs: dict[tuple[Any, ...], tuple[Any, Cost]] = {}
