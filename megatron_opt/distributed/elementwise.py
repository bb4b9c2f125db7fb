"""One step of the element-wise rules on this rank's flat slices of logical matrices."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.compute_shards import ComputeShard, shape2d
from megatron_opt.distributed.host_state import HostStates
from megatron_opt.distributed.ownership import make_buckets
from megatron_opt.distributed.param_shards import Rect, has_bf16_copy
from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.kernels.host import on_device, sum_by_index
from megatron_opt.optimizers.base import ElementwiseOptimizer, Reducer, State
from megatron_opt.optimizers.groups import Group


def learning_rate(group: dict[str, Any]) -> float:
    """A parameter group's own: the scheduler's times the group's factor."""
    return float(group["lr"]) * float(group["lr_scale"])


@dataclass(eq=False)
class FlatRun:
    """A contiguous run of a parameter shard that lies in one logical matrix."""

    param_shard: int
    rect: Rect
    share: float  # one over the number of ranks that hold this run
    element_offset: int  # number of its first element, the same on every rank that holds it
    state: State = field(default_factory=dict)

    @property
    def matrix(self) -> str:
        return self.rect.matrix

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        return self.rect.run(flats[self.param_shard])


@dataclass
class ElementwiseStep:
    """Slices by group, their state, and the sums over whole matrices that some rules need."""

    shard_group: ShardGroup
    groups: Sequence[Group]
    group_optimizers: Sequence[Any]
    group_of: dict[str, int]
    host: HostStates = field(default_factory=lambda: HostStates(torch.device("cpu")))  # where some of the state rests

    def __post_init__(self) -> None:
        self.slices: dict[int, list[FlatRun]] = {}
        for index, param_shard in enumerate(self.shard_group.param_shards):
            for rect in param_shard.rects:
                group = self.group_of[rect.matrix]
                if isinstance(self.group_optimizers[group], ElementwiseOptimizer):
                    run = FlatRun(index, rect, self.shard_group.weight[rect.key], self._element_offset(rect))
                    run.state = self.host.rest(self.group_optimizers[group].init_state(rect.run(param_shard.main)))
                    self.slices.setdefault(group, []).append(run)
        self.begun = False  # whether states that begin as the weights have begun
        self.batches = {
            group: self._stretches(group)
            for group, optimizer in enumerate(self.group_optimizers)
            if self.host.fraction and isinstance(optimizer, ElementwiseOptimizer)
        }
        self.writes_model = {  # groups whose kernel writes the model's bf16 parameters beside the main copies
            group
            for group, runs in self.slices.items()
            if all(has_bf16_copy(self.shard_group.param_shards[run.param_shard]) for run in runs)
        }

    def _stretches(self, group: int) -> list[list[str]]:
        """Matrices of a group by batch, the same on every rank: sums over a matrix are made in one."""
        parts = [
            ComputeShard(
                rect.matrix, index, rank, 0, *rect.region[:2], shape2d(self.shard_group.infos[rect.matrix]), rect.region
            )
            for rank, held_rects in enumerate(self.shard_group.holdings)
            for index, (_, rect) in enumerate(held_rects)
            if self.group_of[rect.matrix] == group
        ]
        width = self.group_optimizers[group].cost(1).state_bytes
        return make_buckets(parts, self.shard_group.size, self.host.batch_bytes, width)

    def _streamed(self, group: int, runs: list[FlatRun], back: bool = True) -> Iterator[list[FlatRun]]:
        """Pieces batch by batch, while their states are on the device; all at once where no state rests in host memory."""
        taken = [runs]
        if group in self.batches:
            by_matrix: dict[str, list[FlatRun]] = {}
            for run in runs:
                by_matrix.setdefault(run.matrix, []).append(run)
            taken = [[run for name in names for run in by_matrix.get(name, ())] for names in self.batches[group]]
        for number in self.host.stream([[run.state for run in several] for several in taken], back):
            yield taken[number]

    def _optimizers_and_runs(self, skip: set[str]) -> Iterator[tuple[int, Any, list[FlatRun]]]:
        """Element-wise rules by group, and the slices that they step; every rank of the shard group gets every group."""
        for index, optimizer in enumerate(self.group_optimizers):
            if isinstance(optimizer, ElementwiseOptimizer):
                yield index, optimizer, [run for run in self.slices.get(index, []) if run.matrix not in skip]

    def add_global_sum_terms(
        self,
        sums: dict[str, Tensor],
        grads: list[Tensor],
        factors: list[float],
        skip: set[str],
        number: int,
        param_groups: list[dict[str, Any]],
    ) -> None:
        """Add this rank's share of what rules sum over all that they train, (k,) by the rule's name."""
        mains = [param_shard.main for param_shard in self.shard_group.param_shards]
        for index, optimizer, runs in self._optimizers_and_runs(skip):
            if type(optimizer).global_sum_terms is ElementwiseOptimizer.global_sum_terms:
                continue
            terms, order = list[Tensor](), list[FlatRun]()
            for several in self._streamed(index, runs, back=False):
                states = [run.state for run in several]
                pieces = ([run.of(mains) for run in several], [run.of(grads) for run in several])
                rate = learning_rate(param_groups[index])
                term = optimizer.global_sum_terms(*pieces, states, number, rate, factors[index])
                terms, order = terms + ([] if term is None else [term]), order + several
            if not terms:
                continue
            values = terms[0]
            if len(terms) > 1:  # in the order of pieces, so that sums are the same however they come
                position = {id(run): at for at, run in enumerate(order)}
                values = torch.cat(terms)[on_device([position[id(run)] for run in runs], values.device, torch.long)]
            counted = [float(self.shard_group.counted[self.shard_group.order[run.matrix]]) for run in runs]
            device = values.device if runs else self.shard_group.device
            shares = on_device([run.share for run in runs], device, torch.float64)
            factor = shares * on_device(counted, device, torch.float64)
            shared = on_device(values, device, torch.float64) * factor.unsqueeze(1)
            width = shared.shape[1]
            before = sums.get(optimizer.name, shared.new_zeros(width)).view(1, width)
            addends = torch.cat([before, shared])  # one after another
            columns = torch.arange(width, device=device).expand_as(addends)
            sums[optimizer.name] = sum_by_index(addends.reshape(-1), columns.reshape(-1), width)

    def step(
        self,
        grads: list[Tensor],
        factors: list[float],
        skip: set[str],
        number: int,
        param_groups: list[dict[str, Any]],
        sums: dict[str, Tensor],
    ) -> None:
        """p ← p − lr·(u + wd·p) on every slice; `sums` are what `add_global_sum_terms` adds, over all ranks."""
        mains = [param_shard.main for param_shard in self.shard_group.param_shards]
        model_copies = [
            param_shard.main if (copy := param_shard.model_copy()) is None else copy
            for param_shard in self.shard_group.param_shards
        ]
        for index, optimizer, own_runs in self._optimizers_and_runs(skip):
            group = param_groups[index]
            for runs in self._streamed(index, own_runs):
                optimizer.update(
                    [run.of(mains) for run in runs],
                    [run.of(grads) for run in runs],
                    [run.state for run in runs],
                    number,
                    lr=learning_rate(group),
                    weight_decay=group["weight_decay"],
                    reducer=self._reducer(runs, sums.get(optimizer.name)),
                    grad_scale=factors[index],
                    decay_mode=self.groups[index].decay_mode,
                    copies=[run.of(model_copies) for run in runs] if index in self.writes_model else (),
                    element_offsets=[run.element_offset for run in runs],
                )

    def begin_weights(self) -> None:
        """States that begin as the weights take them as they are now, once."""
        if self.begun:
            return
        self.begun = True
        for index, runs in self.slices.items():
            for run in runs if self.group_optimizers[index].weight_keys else ():
                main = run.rect.run(self.shard_group.param_shards[run.param_shard].main)
                for key in self.group_optimizers[index].weight_keys:
                    run.state[key].copy_(main)

    def _element_offset(self, rect: Rect) -> int:
        """Number of a run's first element: its matrix's begin at a hash of the name, so that replicas round alike."""
        columns = (*self.shard_group.infos[rect.matrix].shape, 1)[1]
        return zlib.crc32(rect.matrix.encode()) * 2**30 + rect.region.row0 * columns + rect.region.col0

    def update_curvature(self, grads: list[Tensor], scale: float, squared: bool) -> None:
        """Gradients, squared or not, times `scale` into the curvature of the rules that keep one."""
        for index, optimizer in enumerate(self.group_optimizers):
            if hasattr(optimizer, "update_curvature") and index in self.slices:
                for runs in self._streamed(index, self.slices[index]):
                    optimizer.update_curvature(
                        [run.state for run in runs], [run.of(grads) for run in runs], scale, squared
                    )

    def _reducer(self, runs: list[FlatRun], total: Tensor | None) -> Reducer:
        shard_group = self.shard_group

        def per_matrix(values: Tensor) -> Tensor:
            device = values.device if runs else shard_group.device
            shares = on_device([run.share for run in runs], device, torch.float64)
            numbers = on_device([shard_group.order[run.matrix] for run in runs], device, torch.long)
            mine = sum_by_index(on_device(values, device, torch.float64) * shares, numbers, len(shard_group.order))
            total = shard_group.sum_over_ranks(mine)  # on every rank, also where nothing of the group lies
            return total[numbers].to(values) if runs else values

        return Reducer([shard_group.infos[run.matrix].numel for run in runs], per_matrix, total)
