"""One step of the element-wise rules on this rank's flat slices of logical matrices."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.domain import Domain
from megatron_opt.distributed.fragments import Rect, has_bf16_copy
from megatron_opt.distributed.host_state import HostStates
from megatron_opt.distributed.ownership import make_buckets
from megatron_opt.distributed.parts import Part, shape2d
from megatron_opt.kernels.host import on_device, sum_by_index
from megatron_opt.optimizers.base import ElementwiseOptimizer, Reducer, State
from megatron_opt.optimizers.groups import Group


def learning_rate(group: dict[str, Any]) -> float:
    """A parameter group's own: the scheduler's times the group's factor."""
    return float(group["lr"]) * float(group["lr_scale"])


@dataclass(eq=False)
class FlatRun:
    """A contiguous run of a fragment that lies in one logical matrix."""

    fragment: int
    rect: Rect
    share: float  # one over the number of ranks that hold this run
    element_offset: int  # number of its first element, the same on every rank that holds it
    state: State = field(default_factory=dict)

    @property
    def matrix(self) -> str:
        return self.rect.matrix

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        return self.rect.run(flats[self.fragment])


@dataclass
class ElementwiseStep:
    """Slices by group, their state, and the sums over whole matrices that some rules need."""

    domain: Domain
    groups: Sequence[Group]
    rules: Sequence[Any]
    group_of: dict[str, int]
    host: HostStates = field(default_factory=lambda: HostStates(torch.device("cpu")))  # where some of the state rests

    def __post_init__(self) -> None:
        self.slices: dict[int, list[FlatRun]] = {}
        for index, fragment in enumerate(self.domain.fragments):
            for rect in fragment.rects:
                group = self.group_of[rect.matrix]
                if isinstance(self.rules[group], ElementwiseOptimizer):
                    piece = FlatRun(index, rect, self.domain.weight[rect.key], self._element_offset(rect))
                    piece.state = self.host.rest(self.rules[group].init_state(rect.run(fragment.main)))
                    self.slices.setdefault(group, []).append(piece)
        self.batches = {
            group: self._stretches(group)
            for group, rule in enumerate(self.rules)
            if self.host.fraction and isinstance(rule, ElementwiseOptimizer)
        }
        self.writes_model = {  # groups whose kernel writes the model's bf16 parameters beside the main copies
            group
            for group, pieces in self.slices.items()
            if all(has_bf16_copy(self.domain.fragments[piece.fragment]) for piece in pieces)
        }

    def _stretches(self, group: int) -> list[list[str]]:
        """Matrices of a group by batch, the same on every rank: sums over a matrix are made in one."""
        parts = [
            Part(rect.matrix, index, rank, 0, *rect.region[:2], shape2d(self.domain.infos[rect.matrix]), rect.region)
            for rank, held in enumerate(self.domain.holdings)
            for index, (_, rect) in enumerate(held)
            if self.group_of[rect.matrix] == group
        ]
        width = self.rules[group].cost(1).state_bytes
        return make_buckets(parts, self.domain.size, self.host.batch_bytes, width)

    def _streamed(self, group: int, pieces: list[FlatRun], back: bool = True) -> Iterator[list[FlatRun]]:
        """Pieces batch by batch, while their states are on the device; all at once where no state rests in host memory."""
        taken = [pieces]
        if group in self.batches:
            by_matrix: dict[str, list[FlatRun]] = {}
            for piece in pieces:
                by_matrix.setdefault(piece.matrix, []).append(piece)
            taken = [[piece for name in names for piece in by_matrix.get(name, ())] for names in self.batches[group]]
        for number in self.host.stream([[piece.state for piece in several] for several in taken], back):
            yield taken[number]

    def _rules(self, skip: set[str]) -> Iterator[tuple[int, Any, list[FlatRun]]]:
        """Element-wise rules by group, and the slices that they step; every rank of the domain gets every group."""
        for index, rule in enumerate(self.rules):
            if isinstance(rule, ElementwiseOptimizer):
                yield index, rule, [piece for piece in self.slices.get(index, []) if piece.matrix not in skip]

    def add_global_sum_terms(
        self, sums: dict[str, Tensor], grads: list[Tensor], factors: list[float], skip: set[str], number: int
    ) -> None:
        """Add this rank's share of what rules sum over all that they train, by the rule's name."""
        for index, rule, pieces in self._rules(skip):
            if type(rule).global_sum_terms is ElementwiseOptimizer.global_sum_terms:
                continue
            terms, order = list[Tensor](), list[FlatRun]()
            for several in self._streamed(index, pieces, back=False):
                states = [piece.state for piece in several]
                term = rule.global_sum_terms([piece.of(grads) for piece in several], states, number, factors[index])
                terms, order = terms + ([] if term is None else [term]), order + several
            if not terms:
                continue
            values = terms[0]
            if len(terms) > 1:  # in the order of pieces, so that sums are the same however they come
                place = {id(piece): at for at, piece in enumerate(order)}
                values = torch.cat(terms)[on_device([place[id(piece)] for piece in pieces], values.device, torch.long)]
            counted = [float(self.domain.counted[self.domain.order[piece.matrix]]) for piece in pieces]
            device = values.device if pieces else self.domain.device
            shares = on_device([piece.share for piece in pieces], device, torch.float64)
            shared = on_device(values, device, torch.float64) * shares * on_device(counted, device, torch.float64)
            addends = torch.cat([sums.get(rule.name, shared.new_zeros(())).view(1), shared])  # one after another
            sums[rule.name] = sum_by_index(addends, torch.zeros_like(addends, dtype=torch.long), 1)[0]

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
        mains = [fragment.main for fragment in self.domain.fragments]
        model_copies = [
            fragment.main if (copy := fragment.model_copy()) is None else copy for fragment in self.domain.fragments
        ]
        for index, rule, held in self._rules(skip):
            group = param_groups[index]
            for pieces in self._streamed(index, held):
                rule.update(
                    [piece.of(mains) for piece in pieces],
                    [piece.of(grads) for piece in pieces],
                    [piece.state for piece in pieces],
                    number,
                    lr=learning_rate(group),
                    weight_decay=group["weight_decay"],
                    reducer=self._reducer(pieces, sums.get(rule.name)),
                    grad_scale=factors[index],
                    decay_mode=self.groups[index].decay_mode,
                    copies=[piece.of(model_copies) for piece in pieces] if index in self.writes_model else (),
                    element_offsets=[piece.element_offset for piece in pieces],
                )

    def _element_offset(self, rect: Rect) -> int:
        """Number of a run's first element: its matrix's begin at a hash of the name, so that replicas round alike."""
        columns = (*self.domain.infos[rect.matrix].shape, 1)[1]
        return zlib.crc32(rect.matrix.encode()) * 2**30 + rect.region.row0 * columns + rect.region.col0

    def update_curvature(self, grads: list[Tensor], scale: float, squared: bool) -> None:
        """Gradients, squared or not, times `scale` into the curvature of the rules that keep one."""
        for index, rule in enumerate(self.rules):
            if hasattr(rule, "update_curvature") and index in self.slices:
                for pieces in self._streamed(index, self.slices[index]):
                    rule.update_curvature(
                        [piece.state for piece in pieces], [piece.of(grads) for piece in pieces], scale, squared
                    )

    def _reducer(self, pieces: list[FlatRun], total: Tensor | None) -> Reducer:
        domain = self.domain

        def per_matrix(values: Tensor) -> Tensor:
            device = values.device if pieces else domain.device
            shares = on_device([piece.share for piece in pieces], device, torch.float64)
            numbers = on_device([domain.order[piece.matrix] for piece in pieces], device, torch.long)
            total = sum_by_index(on_device(values, device, torch.float64) * shares, numbers, len(domain.order))
            return domain.sum_over_ranks(total)[numbers].to(values) if pieces else values

        return Reducer([domain.infos[piece.matrix].numel for piece in pieces], per_matrix, total)
