"""The engine: one optimizer for all parameters, layouts and rules, whatever the source of its shards."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.elementwise import ElementwiseStep, learning_rate
from megatron_opt.distributed.evaluation_weights import EvaluationWeights
from megatron_opt.distributed.health import Health
from megatron_opt.distributed.host_state import HostStates
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.post_steps import PostStep
from megatron_opt.distributed.shard_group import MatrixPlan, ShardGroup
from megatron_opt.distributed.weight_average import WeightAverage
from megatron_opt.distributed.weights import WeightStep
from megatron_opt.engine_options import EngineOptions
from megatron_opt.kernels.host import on_device, sum_by_index
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import ElementwiseOptimizer, MatrixOptimizer
from megatron_opt.optimizers.groups import Group


class ShardedOptimizer:
    """Steps every logical matrix once, wherever its shards are.

    Gradients come reduced, whole or as this rank's shard: from Megatron's buffers (`megatron_optimizer.py`) or a torch
    model's parameters (`megatron_opt.torch`). Element-wise rules work on them in place; matrix rules on whole matrices
    at their owners. `param_groups`, one of each group, are set by that source: a scheduler writes their `lr` and
    `weight_decay`, and steps take `learning_rate`. Norms for clipping are sums over logical matrices, so no layout counts
    an element twice; they are over the ranks of `world`, torch's default group where it is None.
    """

    def __init__(
        self,
        shard_groups: Sequence[ShardGroup],
        groups: Sequence[Group],
        options: EngineOptions | None = None,
        *,
        clip_grad: float = 0.0,
        world: Any = None,
    ) -> None:
        options = options or EngineOptions()
        self.shard_groups, self.groups = list(shard_groups), list(groups)
        self.param_groups: list[dict[str, Any]] = []
        self.clip_grad, self.world = clip_grad, world
        self.world_size = dist.get_world_size(world) if dist.is_initialized() else 1
        self.step_number = 0
        self.health = Health(options.on_bad_matrix)
        self.stats: dict[str, dict[str, float]] | None = None  # filled by a step when `want_stats` is set
        self.want_stats = False
        self.has_states = False  # on every rank
        self.device = self.shard_groups[0].device
        self.host = HostStates(self.device, options.offloaded, options.bucket_bytes)
        self.settle_copies: Callable[[], None] = lambda: None  # waits until a background save has copied the weights
        self.post_steps: list[PostStep] = []
        self.average: WeightAverage | None = None  # one of them
        self.stored: list[Any] = []  # state on its way from a checkpoint, between the two calls of Megatron's loading
        self.group_optimizers = [registry.build(group.optimizer, dict(group.options)) for group in self.groups]
        group_of = {info.name: index for index, group in enumerate(self.groups) for info in group.infos}
        self.group_of = group_of
        self.matrix_steps: list[MatrixStep] = []
        self.weight_steps: list[WeightStep] = []
        self.element_steps: list[ElementwiseStep] = []
        for shard_group in self.shard_groups:
            matrix_names = [
                n for n in sorted(shard_group.infos) if isinstance(self.group_optimizers[group_of[n]], MatrixOptimizer)
            ]
            infos = {name: shard_group.infos[name] for name in matrix_names}
            matrix_optimizers = {name: self.group_optimizers[group_of[name]] for name in matrix_names}
            jobs = [Job.of(info, matrix_optimizers[name]) for name, info in infos.items()]
            placed = MatrixPlan.make(shard_group, jobs, options)
            self.matrix_steps.append(MatrixStep(shard_group, placed, matrix_optimizers, infos, host=self.host))
            self.weight_steps.append(
                WeightStep(shard_group, self.matrix_steps[-1], self.groups, self.group_optimizers, group_of)
            )
            self.element_steps.append(
                ElementwiseStep(shard_group, self.groups, self.group_optimizers, group_of, self.host)
            )
        self.evaluation = EvaluationWeights(self.element_steps)
        self.writes_model = set[int]().union(
            *(w.writes_model for w in self.weight_steps), *(e.writes_model for e in self.element_steps)
        )
        self.groups_of = [  # index of each matrix's group, by shard group
            torch.tensor([group_of[name] for name in shard_group.order], dtype=torch.long)
            for shard_group in self.shard_groups
        ]
        self._tables_on_device: list[list[Tensor]] = []

    def get_grad_norm(self) -> float:
        grads = [[_grad(param_shard) for param_shard in shard_group.param_shards] for shard_group in self.shard_groups]
        return self._norms(grads)[0]

    def count_zeros(self) -> float:
        """Zeros in the gradients, each element counted once."""
        totals = []
        for shard_group in self.shard_groups:
            zeros = [
                float((r.run(grad) == 0).sum()) if (grad := param_shard.grad()) is not None else 0.0
                for param_shard in shard_group.param_shards
                for r in param_shard.rects
            ]
            sums = shard_group.sum_per_matrix(torch.tensor(zeros, dtype=torch.float64))
            totals.append((sums * shard_group.counted).sum())
        return float(self._sum_over_shard_groups(totals))

    # The step

    @torch.no_grad()
    def update(self) -> float:
        """Clip, update all parameters, run the post-steps, write all to the model; returns the gradient norm.

        A parameter without gradient is left as it is.
        """
        if not self.has_states:
            self.ensure_states()
        grads = [[_grad(param_shard) for param_shard in shard_group.param_shards] for shard_group in self.shard_groups]
        for post in self.post_steps:
            post.prepare()
        grad_norm, scopes, squares = self._norms(grads)
        coefficients = [self._clip_factor(scopes, group) for group in self.groups]
        self.step_number += 1
        bad = [
            {name for name, square in zip(shard_group.order, of_matrix, strict=True) if not math.isfinite(square)}
            for shard_group, of_matrix in zip(self.shard_groups, squares, strict=True)
        ]
        for shard_group, names in zip(self.shard_groups, bad, strict=True):
            self.health.report(names, self.step_number, shard_group.rank == 0)
        before = self._weights_before()
        self._step_matrices(grads, squares, coefficients, bad)
        still = [
            names | _without_gradient(shard_group) for shard_group, names in zip(self.shard_groups, bad, strict=True)
        ]
        self._step_elements(grads, coefficients, still)
        changed = {id(param_shard) for post in self.post_steps for param_shard in post.run(self.step_number)}
        if before is not None:
            self._record(before)
        for param_shard in self.param_shards():
            if id(param_shard) in changed or not self.publishes(param_shard):
                param_shard.publish()
        return grad_norm

    def publishes(self, param_shard: Any) -> bool:
        """Whether the steps themselves write all of a parameter shard to the model."""
        return all(self.group_of[rect.matrix] in self.writes_model for rect in param_shard.rects)

    def _step_matrices(
        self, grads: list[list[Tensor]], squares: list[list[float]], factors: list[float], bad: list[set[str]]
    ) -> None:
        """Matrix rules of all shard groups; their gradients' memory (Megatron's own, for fp32) then holds directions."""
        for shard_group, matrix, weight, flats, norms, skip in zip(
            self.shard_groups, self.matrix_steps, self.weight_steps, grads, squares, bad, strict=True
        ):
            if not matrix.infos:
                continue
            skip = skip | {name for name in matrix.infos if norms[shard_group.order[name]] == 0.0}
            scale = {name: factors[self.group_of[name]] for name in matrix.infos}
            directions = matrix.step(flats, scale, skip, self.step_number)
            weight.step(directions, skip, self.param_groups)

    def _step_elements(self, grads: list[list[Tensor]], factors: list[float], bad: list[set[str]]) -> None:
        """Element-wise rules of all shard groups; what a rule sums over all that it trains is summed first."""
        sums: dict[str, Tensor] = {}
        for element, flats, skip in zip(self.element_steps, grads, bad, strict=True):
            element.add_global_sum_terms(sums, flats, factors, skip, self.step_number, self.param_groups)
        if sums:
            names = sorted(sums)
            total = self._sum_over_world(torch.cat([sums[name] for name in names]))
            sums = dict(zip(names, total.split([len(sums[name]) for name in names]), strict=True))
        for optimizer, group in zip(self.group_optimizers, self.param_groups, strict=True):
            if isinstance(optimizer, ElementwiseOptimizer):
                optimizer.advance(self.step_number, learning_rate(group), sums.get(optimizer.name))
        for element, flats, skip in zip(self.element_steps, grads, bad, strict=True):
            element.step(flats, factors, skip, self.step_number, self.param_groups, sums)

    def curvature_due(self, step: int) -> bool:
        """Whether a rule wants a curvature estimate after step `step`."""
        return any(
            hasattr(optimizer, "curvature_due") and optimizer.curvature_due(step) for optimizer in self.group_optimizers
        )

    @torch.no_grad()
    def update_curvature(self, scale: float, squared: bool) -> None:
        """Take what is now in the gradient buffers, squared or not, times `scale`, as a curvature estimate."""
        for element in self.element_steps:
            element.update_curvature(
                [_grad(param_shard) for param_shard in element.shard_group.param_shards], scale, squared
            )

    def forget_states(self) -> None:
        """Let state that is made of the weights be made anew, of weights that have come since."""
        for step in self.matrix_steps:
            step.states.clear()
        for element in self.element_steps:
            element.begun = False
        self.has_states = False

    def ensure_states(self) -> None:
        """Make of the current weights what state is made of them and not there yet."""
        for element in self.element_steps:
            element.begin_weights()
        for shard_group, step in zip(self.shard_groups, self.matrix_steps, strict=True):
            wanted = shard_group.sum_over_ranks(
                torch.tensor([float(len(step.states) < len(step.mine))], dtype=torch.float64)
            )
            if float(wanted) > 0:
                step.init_states([param_shard.main for param_shard in shard_group.param_shards])
        self.has_states = True

    # Norms

    def _norms(self, grads: list[list[Tensor]]) -> tuple[float, dict[str, float], list[list[float]]]:
        """The global norm, the norm of each clipping scope, and squared norms by matrix of each shard group.

        Matrices whose norm is not finite are left out of the sums: they will be skipped. A step's one wait for the device.
        """
        scopes = sorted({group.clip_scope for group in self.groups if group.clip_scope})
        squares = [
            shard_group.squared_norms(flats) for shard_group, flats in zip(self.shard_groups, grads, strict=True)
        ]
        totals = []
        for of_group, (counted, groups, scope_of) in zip(squares, self._tables(scopes), strict=True):
            finite = torch.nan_to_num(of_group, nan=0.0, posinf=0.0, neginf=0.0) * counted
            by_group = sum_by_index(finite, groups, len(self.groups))
            by_scope = sum_by_index(by_group, scope_of, len(scopes) + 1)[:-1]  # the last: groups that are not clipped
            totals.append(torch.cat([finite.sum().view(1), by_scope]))
        norms = self._sum_over_shard_groups(totals).sqrt()
        lengths = [len(norms), *(len(of_group) for of_group in squares)]
        first, *rest = (part.tolist() for part in torch.cat([norms, *squares]).cpu().split(lengths))
        return first[0], dict(zip(scopes, first[1:], strict=True)), rest

    def _tables(self, scopes: list[str]) -> list[list[Tensor]]:
        """By shard group, on the device: whether a matrix counts, its group, and each group's clipping scope."""
        if not self._tables_on_device:
            scope_of = [scopes.index(group.clip_scope) if group.clip_scope else len(scopes) for group in self.groups]
            self._tables_on_device = [
                [on_device(table, self.device) for table in (shard_group.counted, groups, torch.tensor(scope_of))]
                for shard_group, groups in zip(self.shard_groups, self.groups_of, strict=True)
            ]
        return self._tables_on_device

    def _clip_factor(self, norms: dict[str, float], group: Group) -> float:
        limit = self.clip_grad
        if limit <= 0 or group.clip_scope is None:
            return 1.0
        return min(1.0, limit / (norms[group.clip_scope] + 1e-6))

    def _sum_over_shard_groups(self, sums: Sequence[Tensor]) -> Tensor:
        """Over the whole model, of what each shard group has summed over its ranks."""
        if all(shard_group.size == self.world_size for shard_group in self.shard_groups):
            return torch.stack(list(sums)).sum(0) if len(sums) > 1 else sums[0]
        shares = [value / shard_group.size for value, shard_group in zip(sums, self.shard_groups, strict=True)]
        return self._sum_over_world(torch.stack(shares).sum(0))

    def _sum_over_world(self, values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved, group=self.world)
        return moved.to(values.device)

    # Statistics for the log

    def _weights_before(self) -> list[list[Tensor]] | None:
        if not self.want_stats:
            return None
        return [
            [param_shard.main.clone() for param_shard in shard_group.param_shards] for shard_group in self.shard_groups
        ]

    def _record(self, before: list[list[Tensor]]) -> None:
        """Norms of weights and updates by group."""
        totals = []
        for shard_group, old, groups in zip(self.shard_groups, before, self.groups_of, strict=True):
            sums = torch.zeros(len(self.groups), 2, dtype=torch.float64)
            mains = [param_shard.main for param_shard in shard_group.param_shards]
            moved = [main - past for main, past in zip(mains, old, strict=True)]
            for what, flats in enumerate((mains, moved)):
                squared = shard_group.squared_norms(flats).cpu() * shard_group.counted
                sums[:, what].index_add_(0, groups, squared)
            totals.append(sums)
        self.stats = {
            group.name: {"weight_norm": math.sqrt(max(w, 0.0)), "update_norm": math.sqrt(max(u, 0.0))}
            for group, (w, u) in zip(self.groups, self._sum_over_shard_groups(totals).tolist(), strict=True)
        }

    def param_shards(self) -> list[Any]:
        """Parameter shards of all shard groups."""
        return [param_shard for shard_group in self.shard_groups for param_shard in shard_group.param_shards]


def _without_gradient(shard_group: ShardGroup) -> set[str]:
    """Matrices whose parameter got no gradient: matrix rules see the zeros in its place, others would decay it."""
    return {
        rect.matrix
        for param_shard in shard_group.param_shards
        if not param_shard.has_grad()
        for rect in param_shard.rects
    }


def _grad(param_shard: Any) -> Tensor:
    grad = param_shard.grad()
    return torch.zeros_like(param_shard.main) if grad is None else grad
