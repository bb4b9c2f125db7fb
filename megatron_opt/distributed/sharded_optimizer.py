"""The engine: one optimizer for all parameters, layouts and rules, whatever the source of its shards."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.domain import Domain, MatrixPlan
from megatron_opt.distributed.elementwise import ElementwiseStep
from megatron_opt.distributed.health import Health
from megatron_opt.distributed.host_state import HostStates
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.post_steps import PostStep
from megatron_opt.distributed.weight_average import WeightAverage
from megatron_opt.distributed.weights import WeightStep
from megatron_opt.engine_options import EngineOptions
from megatron_opt.kernels.host import on_device, sum_by_index
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixOptimizer
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
        domains: Sequence[Domain],
        groups: Sequence[Group],
        options: EngineOptions | None = None,
        *,
        clip_grad: float = 0.0,
        world: Any = None,
    ) -> None:
        options = options or EngineOptions()
        self.domains, self.groups = list(domains), list(groups)
        self.param_groups: list[dict[str, Any]] = []
        self.clip_grad, self.world = clip_grad, world
        self.world_size = dist.get_world_size(world) if dist.is_initialized() else 1
        self.step_number = 0
        self.health = Health(options.on_bad_matrix)
        self.stats: dict[str, dict[str, float]] | None = None  # filled by a step when `want_stats` is set
        self.want_stats = False
        self.has_states = False  # on every rank
        self.device = self.domains[0].device
        self.host = HostStates(self.device, options.offloaded, options.bucket_bytes)
        self.post_steps: list[PostStep] = []
        self.average: WeightAverage | None = None  # one of them
        self.stored: list[Any] = []  # state on its way from a checkpoint, between the two calls of Megatron's loading
        self.rules = [registry.build(group.optimizer, dict(group.options)) for group in self.groups]
        group_of = {info.name: index for index, group in enumerate(self.groups) for info in group.infos}
        self.group_of = group_of
        self.matrix_steps: list[MatrixStep] = []
        self.weight_steps: list[WeightStep] = []
        self.element_steps: list[ElementwiseStep] = []
        for domain in self.domains:
            matrix_names = [n for n in sorted(domain.infos) if isinstance(self.rules[group_of[n]], MatrixOptimizer)]
            infos = {name: domain.infos[name] for name in matrix_names}
            rules = {name: self.rules[group_of[name]] for name in matrix_names}
            jobs = [Job.of(info, rules[name]) for name, info in infos.items()]
            placed = MatrixPlan.make(domain, jobs, options)
            self.matrix_steps.append(MatrixStep(domain, placed, rules, infos, host=self.host))
            self.weight_steps.append(WeightStep(domain, self.matrix_steps[-1], self.groups, self.rules, group_of))
            self.element_steps.append(ElementwiseStep(domain, self.groups, self.rules, group_of, self.host))
        self.writes_model = set[int]().union(
            *(w.writes_model for w in self.weight_steps), *(e.writes_model for e in self.element_steps)
        )
        self.groups_of = [  # index of each matrix's group, by domain
            torch.tensor([group_of[name] for name in domain.order], dtype=torch.long) for domain in self.domains
        ]
        self._tables_on_device: list[list[Tensor]] = []

    def get_grad_norm(self) -> float:
        grads = [[_grad(fragment) for fragment in domain.fragments] for domain in self.domains]
        return self._norms(grads)[0]

    def count_zeros(self) -> float:
        """Zeros in the gradients, each element counted once."""
        found = []
        for domain in self.domains:
            zeros = [
                float((r.run(grad) == 0).sum()) if (grad := fragment.grad()) is not None else 0.0
                for fragment in domain.fragments
                for r in fragment.rects
            ]
            sums = domain.sum_per_matrix(torch.tensor(zeros, dtype=torch.float64))
            found.append((sums * domain.counted).sum())
        return float(self._sum_over_domains(found))

    # The step

    @torch.no_grad()
    def update(self) -> float:
        """Clip, update all parameters, run the post-steps, write all to the model; returns the gradient norm.

        A parameter without gradient is left as it is.
        """
        if not self.has_states:
            self.ensure_states()
        grads = [[_grad(fragment) for fragment in domain.fragments] for domain in self.domains]
        for post in self.post_steps:
            post.prepare()
        grad_norm, scopes, squares = self._norms(grads)
        coefficients = [self._clip_factor(scopes, group) for group in self.groups]
        self.step_number += 1
        bad = [
            {name for name, square in zip(domain.order, found, strict=True) if not math.isfinite(square)}
            for domain, found in zip(self.domains, squares, strict=True)
        ]
        for domain, names in zip(self.domains, bad, strict=True):
            self.health.report(names, self.step_number, domain.rank == 0)
        before = self._weights_before()
        self._step_matrices(grads, squares, coefficients, bad)
        still = [names | _without_gradient(domain) for domain, names in zip(self.domains, bad, strict=True)]
        self._step_elements(grads, coefficients, still)
        changed = {id(fragment) for post in self.post_steps for fragment in post.run(self.step_number)}
        if before is not None:
            self._record(before)
        for fragment in self.fragments():
            if id(fragment) in changed or not self.publishes(fragment):
                fragment.publish()
        return grad_norm

    def publishes(self, fragment: Any) -> bool:
        """Whether the steps themselves write all of a fragment to the model."""
        return all(self.group_of[rect.matrix] in self.writes_model for rect in fragment.rects)

    def _step_matrices(
        self, grads: list[list[Tensor]], squares: list[list[float]], factors: list[float], bad: list[set[str]]
    ) -> None:
        """Matrix rules of all domains; their gradients' memory (Megatron's own, for fp32) then holds directions."""
        for domain, matrix, weight, flats, found, skip in zip(
            self.domains, self.matrix_steps, self.weight_steps, grads, squares, bad, strict=True
        ):
            if not matrix.infos:
                continue
            skip = skip | {name for name in matrix.infos if found[domain.order[name]] == 0.0}
            scale = {name: factors[self.group_of[name]] for name in matrix.infos}
            directions = matrix.step(flats, scale, skip, self.step_number)
            weight.step(directions, skip, self.param_groups)

    def _step_elements(self, grads: list[list[Tensor]], factors: list[float], bad: list[set[str]]) -> None:
        """Element-wise rules of all domains; what a rule sums over all that it trains is summed first."""
        sums: dict[str, Tensor] = {}
        for element, flats, skip in zip(self.element_steps, grads, bad, strict=True):
            element.add_global_sum_terms(sums, flats, factors, skip, self.step_number)
        if sums:
            total = self._sum_over_world(torch.stack([sums[name] for name in sorted(sums)]))
            sums = dict(zip(sorted(sums), total.unbind(), strict=True))
        for element, flats, skip in zip(self.element_steps, grads, bad, strict=True):
            element.step(flats, factors, skip, self.step_number, self.param_groups, sums)

    def curvature_due(self, step: int) -> bool:
        """Whether a rule wants a curvature estimate after step `step`."""
        return any(hasattr(rule, "curvature_due") and rule.curvature_due(step) for rule in self.rules)

    @torch.no_grad()
    def update_curvature(self, scale: float, squared: bool) -> None:
        """Take what is now in the gradient buffers, squared or not, times `scale`, as a curvature estimate."""
        for element in self.element_steps:
            element.update_curvature([_grad(fragment) for fragment in element.domain.fragments], scale, squared)

    def forget_states(self) -> None:
        """Let the matrix rules' state be made anew, of weights that have come since."""
        for step in self.matrix_steps:
            step.states.clear()
        self.has_states = False

    def ensure_states(self) -> None:
        """Make the matrix rules' state from the current weights where there is none yet."""
        for domain, step in zip(self.domains, self.matrix_steps, strict=True):
            wanted = domain.sum_over_ranks(
                torch.tensor([float(len(step.states) < len(step.mine))], dtype=torch.float64)
            )
            if float(wanted) > 0:
                step.init_states([fragment.main for fragment in domain.fragments])
        self.has_states = True

    # Norms

    def _norms(self, grads: list[list[Tensor]]) -> tuple[float, dict[str, float], list[list[float]]]:
        """The global norm, the norm of each clipping scope, and squared norms by matrix of each domain.

        Matrices whose norm is not finite are left out of the sums: they will be skipped. A step's one wait for the device.
        """
        scopes = sorted({group.clip_scope for group in self.groups if group.clip_scope})
        squares = [domain.squared_norms(flats) for domain, flats in zip(self.domains, grads, strict=True)]
        totals = []
        for found, (counted, groups, scope_of) in zip(squares, self._tables(scopes), strict=True):
            finite = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0) * counted
            by_group = sum_by_index(finite, groups, len(self.groups))
            by_scope = sum_by_index(by_group, scope_of, len(scopes) + 1)[:-1]  # the last: groups that are not clipped
            totals.append(torch.cat([finite.sum().view(1), by_scope]))
        norms = self._sum_over_domains(totals).sqrt()
        lengths = [len(norms), *(len(found) for found in squares)]
        first, *rest = (part.tolist() for part in torch.cat([norms, *squares]).cpu().split(lengths))
        return first[0], dict(zip(scopes, first[1:], strict=True)), rest

    def _tables(self, scopes: list[str]) -> list[list[Tensor]]:
        """By domain, on the device: whether a matrix counts, its group, and each group's clipping scope."""
        if not self._tables_on_device:
            scope_of = [scopes.index(group.clip_scope) if group.clip_scope else len(scopes) for group in self.groups]
            self._tables_on_device = [
                [on_device(table, self.device) for table in (domain.counted, groups, torch.tensor(scope_of))]
                for domain, groups in zip(self.domains, self.groups_of, strict=True)
            ]
        return self._tables_on_device

    def _clip_factor(self, norms: dict[str, float], group: Group) -> float:
        limit = self.clip_grad
        if limit <= 0 or group.clip_scope is None:
            return 1.0
        return min(1.0, limit / (norms[group.clip_scope] + 1e-6))

    def _sum_over_domains(self, sums: Sequence[Tensor]) -> Tensor:
        """Over the whole model, of what each domain has summed over its ranks."""
        if all(domain.size == self.world_size for domain in self.domains):
            return torch.stack(list(sums)).sum(0) if len(sums) > 1 else sums[0]
        shares = [value / domain.size for value, domain in zip(sums, self.domains, strict=True)]
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
        return [[fragment.main.clone() for fragment in domain.fragments] for domain in self.domains]

    def _record(self, before: list[list[Tensor]]) -> None:
        """Norms of weights and updates by group."""
        totals = []
        for domain, old, groups in zip(self.domains, before, self.groups_of, strict=True):
            sums = torch.zeros(len(self.groups), 2, dtype=torch.float64)
            mains = [fragment.main for fragment in domain.fragments]
            moved = [main - past for main, past in zip(mains, old, strict=True)]
            for what, flats in enumerate((mains, moved)):
                found = domain.squared_norms(flats).cpu() * domain.counted
                sums[:, what].index_add_(0, groups, found)
            totals.append(sums)
        self.stats = {
            group.name: {"weight_norm": math.sqrt(max(w, 0.0)), "update_norm": math.sqrt(max(u, 0.0))}
            for group, (w, u) in zip(self.groups, self._sum_over_domains(totals).tolist(), strict=True)
        }

    def fragments(self) -> list[Any]:
        """Fragments of all domains."""
        return [fragment for domain in self.domains for fragment in domain.fragments]


def _without_gradient(domain: Domain) -> set[str]:
    """Matrices whose parameter got no gradient: matrix rules see the zeros in its place, others would decay it."""
    return {rect.matrix for fragment in domain.fragments if not fragment.has_grad() for rect in fragment.rects}


def _grad(fragment: Any) -> Tensor:
    grad = fragment.grad()
    return torch.zeros_like(fragment.main) if grad is None else grad
