"""One step of the matrix rules over a domain: shards to owners, the rule on whole matrices or slices, updates back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.domain import Domain, MatrixPlan, shape2d
from megatron_opt.distributed.exchange import Part, Route, Trip, wires
from megatron_opt.optimizers.base import MatrixInfo, State
from megatron_opt.optimizers.slices import SliceStep

Key = tuple[str, int]


@dataclass
class MatrixStep:
    """State of the parts that this rank computes, and the pipeline that steps them bucket by bucket."""

    domain: Domain
    placed: MatrixPlan
    rules: dict[str, Any]  # matrix name -> its MatrixOptimizer
    infos: dict[str, MatrixInfo]
    states: dict[Key, State] = field(default_factory=dict)
    shared: dict[str, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mine = {key: part for key, part in self.placed.parts.items() if part.rank == self.domain.rank}
        self.sliced = {
            name: parts for name in self.infos if len(parts := self.placed.of_matrix(name)) > 1
        }
        self.edges = {name: (0, *[part.stop for part in parts]) for name, parts in self.sliced.items()}
        self.legs = {name: self.rules[name].legs(self.infos[name], edges) for name, edges in self.edges.items()}

    def _slabs(self, names: Sequence[str], route: Route, flats: Sequence[Tensor]) -> dict[Key, Tensor]:
        """Room for this rank's parts; where a part already lies whole in one local rectangle, that rectangle itself."""
        local: dict[Key, list[Any]] = {}
        for source, items in enumerate(route.gather_in):
            for item in items:
                local.setdefault(item.part, []).append((source, item))
        slabs = {}
        wanted = set(names)
        for key, part in self.mine.items():
            if part.matrix not in wanted:
                continue
            found = local.get(key, [])
            if len(found) == 1 and found[0][0] == self.domain.rank and found[0][1].numel == _numel(part):
                slabs[key] = found[0][1].of_fragment(flats[found[0][1].fragment])
            else:
                slabs[key] = torch.empty(part.slab_shape, dtype=torch.float32, device=self.domain.device)
        return slabs

    def gather(self, flats: Sequence[Tensor]) -> dict[Key, Tensor]:
        """This rank's parts of per-fragment flat tensors (weights, say), bucket after bucket."""
        found: dict[Key, Tensor] = {}
        for names, route in zip(self.placed.buckets, self.placed.routes, strict=True):
            slabs = self._slabs(names, route, flats)
            self.domain.exchange.gather(route, flats, slabs, "weights to owners").finish()
            found.update(slabs)
        return found

    def init_states(self, weights: Sequence[Tensor]) -> None:
        """State before the first step, from the current weights."""
        for key, slab in self.gather(weights).items():
            name, _ = key
            rule, info = self.rules[name], self.infos[name]
            if name in self.sliced:
                self.states[key] = rule.init_slice(slab, info)
            else:
                self.states[key] = rule.init_state(slab.view(info.shape).clone(), info)
        for name in self.sliced:
            if self.placed.plan.owner[name] == self.domain.rank:
                self.shared[name] = self.rules[name].init_shared(self.infos[name], self.domain.device)

    def step(self, grads: Sequence[Tensor], scale: dict[str, float], skip: set[str], number: int) -> None:
        """Replace the gradients in `grads` by directions u; `scale` are clip factors, `skip` matrices left alone.

        While one bucket is computed, the next one's gradients and the last one's directions travel.
        """
        exchange, placed = self.domain.exchange, self.placed
        under_way: list[Trip] = []
        pending: tuple[Trip, dict[Key, Tensor]] | None = None
        for index in range(len(placed.buckets) + 1):
            coming = None
            if index < len(placed.buckets):
                slabs = self._slabs(placed.buckets[index], placed.routes[index], grads)
                coming = exchange.gather(placed.routes[index], grads, slabs), slabs
            if pending is not None:
                trip, slabs = pending
                trip.finish()
                done = self._compute(placed.buckets[index - 1], slabs, scale, skip, number)
                under_way.append(exchange.scatter(placed.routes[index - 1], done, grads))
            pending = coming
        for trip in under_way:
            trip.finish()

    def _compute(
        self, names: Sequence[str], slabs: dict[Key, Tensor], scale: dict[str, float], skip: set[str], number: int
    ) -> dict[Key, Tensor]:
        """Directions of this rank's parts of one bucket."""
        done: dict[Key, Tensor] = {}
        batches: dict[int, list[Key]] = {}
        rules: dict[int, Any] = {}
        for key, slab in slabs.items():
            name = key[0]
            if name in skip:
                done[key] = slab.zero_()
                continue
            if scale.get(name, 1.0) != 1.0:
                slab.mul_(scale[name])
            if name not in self.sliced:
                rule = self.rules[name]
                rules[id(rule)] = rule
                batches.setdefault(id(rule), []).append(key)
        for which, keys in batches.items():
            infos = [self.infos[name] for name, _ in keys]
            grads = [slabs[key].view(info.shape) for key, info in zip(keys, infos, strict=True)]
            updates = rules[which].update(grads, [self.states[key] for key in keys], number, infos)
            for key, info, update in zip(keys, infos, updates, strict=True):
                done[key] = update.view(shape2d(info))
        cut = [name for name in names if name in self.sliced and name not in skip]
        if cut:
            done.update(self._compute_sliced(cut, slabs, number))
        return done

    def _compute_sliced(self, names: Sequence[str], slabs: dict[Key, Tensor], number: int) -> dict[Key, Tensor]:
        """Slices on several ranks step together: one all-to-all over the domain for each of their exchanges."""
        exchange, size, me = self.domain.exchange, self.domain.size, self.domain.rank
        running: dict[Key, SliceStep] = {}
        waiting: dict[Key, Tensor] = {}
        done: dict[Key, Tensor] = {}

        def resume(key: Key, value: Tensor | None) -> None:
            try:
                waiting[key] = running[key].send(value)  # type: ignore[arg-type]
            except StopIteration as stopped:
                done[key] = stopped.value

        for name in names:
            edges, shared = self.edges[name], self.shared.get(name, {})
            for part in self.sliced[name]:
                if part.rank == me:
                    slab, state = slabs[part.key], self.states[part.key]
                    running[part.key] = self.rules[name].slice_update(
                        slab, state, shared, number, self.infos[name], part.index, edges
                    )
                    resume(part.key, None)
        legs = {name: self.legs[name] for name in names}
        for index, wire in enumerate(wires(legs.values())):
            outgoing: list[list[Tensor]] = [[] for _ in range(size)]
            incoming: list[list[Tensor]] = [[] for _ in range(size)]
            arrived: dict[Key, list[Tensor]] = {}
            for name in names:
                mine = next((part for part in self.sliced[name] if part.rank == me), None)
                if mine is None or index >= len(legs[name]):
                    continue
                leg, tensor = legs[name][index], waiting.pop(mine.key)
                pieces = arrived[mine.key] = []
                for part in self.sliced[name]:
                    outgoing[part.rank].append(leg.outgoing(tensor, part.index))
                    pieces.append(tensor.new_empty(leg.arriving(mine.index, part.index)))
                    incoming[part.rank].append(pieces[-1])
            places = [[(lambda t=t: t) for t in items] for items in incoming]
            counts = [[t.numel() for t in items] for items in incoming]
            exchange.start(outgoing, places, counts, "between slices", wire).finish()
            for key, pieces in arrived.items():
                resume(key, legs[key[0]][index].joined(pieces))
        return done


def _numel(part: Part) -> int:
    rows, cols = part.slab_shape
    return rows * cols
