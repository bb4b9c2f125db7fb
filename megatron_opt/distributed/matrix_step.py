"""One step of the matrix rules over a shard group: shards to owners, the rule on whole matrices or shards, updates back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_opt.distributed.compute_shards import ComputeShard, shape2d
from megatron_opt.distributed.exchange import AsyncTransfer, Item, as_bytes
from megatron_opt.distributed.host_state import HostStates
from megatron_opt.distributed.shard_group import MatrixPlan, ShardGroup
from megatron_opt.optimizers.base import MatrixInfo, State, StateKind, norm_of
from megatron_opt.optimizers.partition import ShardStep

Key = tuple[str, int]


@dataclass
class MatrixStep:
    """State of the parts that this rank computes, and the pipeline that steps them bucket by bucket."""

    shard_group: ShardGroup
    placed: MatrixPlan
    optimizers: dict[str, Any]  # matrix name -> its MatrixOptimizer
    infos: dict[str, MatrixInfo]
    states: dict[Key, State] = field(default_factory=dict)
    shared: dict[Key, State] = field(default_factory=dict)  # by the first part of a submatrix
    host: HostStates = field(default_factory=lambda: HostStates(torch.device("cpu")))  # where some of both rests

    def __post_init__(self) -> None:
        self.mine = {key: part for key, part in self.placed.parts.items() if part.rank == self.shard_group.rank}
        self.submatrices = {part.key: submatrix for submatrix in self.placed.submatrices for part in submatrix.parts}
        self.submatrix_infos = {key: submatrix.info(self.infos[key[0]]) for key, submatrix in self.submatrices.items()}
        self.local_whole = self._local_whole()
        self.cut_matrices = {
            key[0] for key, submatrix in self.submatrices.items() if len(submatrix.parts) > 1 or not submatrix.is_whole
        }
        self.scaled_later = {name for name in self.cut_matrices if self.optimizers[name].projects}
        self.sharded = {submatrix.key: submatrix for submatrix in self.placed.submatrices if len(submatrix.parts) > 1}
        self.partitions = {
            key: self.optimizers[key[0]].partition(self.submatrix_infos[key])
            for key in self.submatrices
            if key[0] in self.cut_matrices
        }
        self.collectives = {
            key: self.partitions[key].collectives(submatrix.edges) for key, submatrix in self.sharded.items()
        }

    def _local_whole(self) -> dict[Key, Item]:
        """This rank's parts that one local rectangle holds whole."""
        whole = {}
        for route in self.placed.routes:
            arriving: dict[Key, list[tuple[int, Item]]] = {}
            for source, items in enumerate(route.gather_in):
                for item in items:
                    arriving.setdefault(item.part, []).append((source, item))
            for key, ((source, item), *others) in arriving.items():
                if not others and source == self.shard_group.rank and item.numel == _numel(self.mine[key]):
                    whole[key] = item
        return whole

    def _buffers(self, names: Sequence[str], flats: Sequence[Tensor]) -> dict[Key, Tensor]:
        """Room for this rank's parts of a bucket; where a part already lies whole in one local rectangle, that itself."""
        buffers, wanted = {}, set(names)
        for key, part in self.mine.items():
            if part.matrix in wanted:
                item = self.local_whole.get(key)
                buffers[key] = (
                    torch.empty(part.buffer_shape, dtype=torch.float32, device=self.shard_group.device)
                    if item is None
                    else item.of_param_shard(flats[item.param_shard])
                )
        return buffers

    def gather(self, flats: Sequence[Tensor]) -> dict[Key, Tensor]:
        """This rank's parts of per-shard flat tensors (weights, say), bucket after bucket."""
        return {key: buffer for buffers in self._gathered(flats) for key, buffer in buffers.items()}

    def _gathered(self, flats: Sequence[Tensor]) -> Iterator[dict[Key, Tensor]]:
        for names, route in zip(self.placed.buckets, self.placed.routes, strict=True):
            buffers = self._buffers(names, flats)
            self.shard_group.exchange.gather(route, flats, buffers, "weights to owners").finish()
            yield buffers

    def init_states(self, weights: Sequence[Tensor]) -> None:
        """State before the first step, from the current weights."""
        for buffers in self._gathered(weights):
            for key, buffer in buffers.items():
                self.states[key] = self.host.rest(self._first_state(key, buffer))
        self._join_norms()

    def _first_state(self, key: Key, buffer: Tensor) -> State:
        optimizer, info, submatrix = self.optimizers[key[0]], self.submatrix_infos[key], self.submatrices[key]
        if key[0] not in self.cut_matrices:
            return optimizer.init_state(buffer.view(info.shape).clone(), info)
        partition = self.partitions[key]
        if submatrix.key not in self.sharded:
            state = partition.optimizer.init_state(buffer.view(info.shape).clone(), info)
        else:
            state = partition.init_shard(buffer)
            if key == submatrix.key:
                self.shared[key] = self.host.rest(partition.init_shared(self.shard_group.device))
        return state | {norm: norm_of(buffer) for norm in optimizer.keys(StateKind.NORM, info)}

    def _batches(self) -> list[list[State]]:
        """States that rest in host memory, by bucket."""
        if not self.host.fraction:
            return [[] for _ in self.placed.buckets]
        where = {name: index for index, names in enumerate(self.placed.buckets) for name in names}
        batches: list[list[State]] = [[] for _ in self.placed.buckets]
        for states in (self.states, self.shared):
            for key, state in states.items():
                batches[where[key[0]]].append(state)
        return batches

    def _join_norms(self) -> None:
        """Norms of parts become those of their matrices, at every part."""
        norms = {name: self.optimizers[name].keys(StateKind.NORM, self.infos[name]) for name in self.cut_matrices}
        for norm in sorted({norm for several in norms.values() for norm in several}):
            squares = torch.zeros(len(self.shard_group.order), dtype=torch.float64)
            mine = [key for key in self.states if norm in norms.get(key[0], ())]
            for key in mine if self.placed.counts else ():
                squares[self.shard_group.order[key[0]]] += float(self.states[key][norm]) ** 2
            squares = self.shard_group.sum_over_ranks(squares)
            for key in mine:
                self.states[key][norm].fill_(float(squares[self.shard_group.order[key[0]]].sqrt()))
        for name, index in self.states:
            if name in self.cut_matrices:
                self.optimizers[name].check_state(self.states[name, index], self.infos[name])

    def step(self, grads: Sequence[Tensor], scale: dict[str, float], skip: set[str], number: int) -> Sequence[Tensor]:
        """Directions u by parameter shard, in the memory of the gradients, which are gone; those of other matrices stay.

        `scale` are clip factors; matrices in `skip` are left alone. While one bucket is computed, the next one's gradients
        and the last one's directions travel; so does state that rests in host memory.
        """
        exchange, placed = self.shard_group.exchange, self.placed
        directions = grads  # one memory: a bucket's gradients have been read before its directions are written
        returning: list[AsyncTransfer] = []
        pending: tuple[AsyncTransfer, dict[Key, Tensor]] | None = None
        states = self.host.stream(self._batches())
        for index in range(len(placed.buckets) + 1):
            coming = None
            if index < len(placed.buckets):
                buffers = self._buffers(placed.buckets[index], grads)
                coming = exchange.gather(placed.routes[index], grads, buffers), buffers
            if pending is not None:
                transfer, buffers = pending
                next(states)
                transfer.finish()
                done = self._compute(placed.buckets[index - 1], buffers, scale, skip, number)
                returning.append(exchange.scatter(placed.routes[index - 1], done, directions))
            pending = coming
        next(states, None)  # the last bucket's go back
        for transfer in returning:
            transfer.finish()
        if self.scaled_later:
            self.rescale(directions, self.scaled_later - skip)
        return directions

    def rescale(self, flats: Sequence[Tensor], names: set[str]) -> None:
        """Scale matrices in per-shard tensors (weights, directions) to the norm that their rule keeps (Hyperball)."""
        squares = self.shard_group.squared_norms(flats)
        factors = torch.zeros_like(squares)
        for (name, part), state in self.states.items() if self.placed.counts else ():
            if (
                part == 0 and self.optimizers[name].projects
            ):  # its rank has the norm, and need not hold any of the matrix
                at = self.shard_group.order[name]
                factors[at] = self.optimizers[name].projection(squares[at], state)
        factors_everywhere = self.shard_group.sum_over_ranks(factors)
        for param_shard, flat in zip(self.shard_group.param_shards, flats, strict=True):
            for rect in param_shard.rects:
                if rect.matrix in names:
                    rect.run(flat).mul_(factors_everywhere[self.shard_group.order[rect.matrix]])

    def _compute(
        self, names: Sequence[str], buffers: dict[Key, Tensor], scale: dict[str, float], skip: set[str], number: int
    ) -> dict[Key, Tensor]:
        """Directions of this rank's parts of one bucket."""
        done: dict[Key, Tensor] = {}
        batches: dict[int, list[Key]] = {}
        optimizers: dict[int, Any] = {}
        for key, buffer in buffers.items():
            name = key[0]
            if name in skip:
                done[key] = buffer.zero_()
                continue
            if scale.get(name, 1.0) != 1.0:
                buffer.mul_(scale[name])
            if self.submatrices[key].key not in self.sharded:
                optimizer = self.partitions[key].optimizer if name in self.cut_matrices else self.optimizers[name]
                optimizers[id(optimizer)] = optimizer
                batches.setdefault(id(optimizer), []).append(key)
        for which, keys in batches.items():
            infos = [self.submatrix_infos[key] for key in keys]
            grads = [buffers[key].view(info.shape) for key, info in zip(keys, infos, strict=True)]
            updates = optimizers[which].update(grads, [self.states[key] for key in keys], number, infos)
            for key, info, update in zip(keys, infos, updates, strict=True):
                done[key] = update.view(shape2d(info))
                self._begin(key, self.states[key])
        wanted = set(names) - skip
        cut = [key for key in self.sharded if key[0] in wanted]
        if cut:
            done.update(self._compute_sharded(cut, buffers, number))
        return done

    def _begin(self, key: Key, state: State) -> None:
        """A submatrix begins with its matrix, which has a gradient, also where the submatrix's own is zero."""
        if not self.submatrices[key].is_whole:
            for flag in self.optimizers[key[0]].keys(StateKind.FLAG, self.submatrix_infos[key]):
                state[flag].fill_(1.0)

    def _compute_sharded(
        self, submatrices: Sequence[Key], buffers: dict[Key, Tensor], number: int
    ) -> dict[Key, Tensor]:
        """Shards on several ranks step together: one all-to-all over the shard group for each of their exchanges."""
        exchange, size, me = self.shard_group.exchange, self.shard_group.size, self.shard_group.rank
        running: dict[Key, ShardStep] = {}
        waiting: dict[Key, Tensor] = {}
        done: dict[Key, Tensor] = {}
        mine: dict[Key, tuple[int, ComputeShard]] = {}  # by submatrix: this rank's shard and its number

        def resume(key: Key, value: Tensor | None) -> None:
            try:
                waiting[key] = running[key].send(value)  # type: ignore[arg-type]
            except StopIteration as stopped:
                done[mine[key][1].key] = stopped.value

        for key in submatrices:
            submatrix, shared = self.sharded[key], self.shared.get(key, {})
            for index, part in enumerate(submatrix.parts):
                if part.rank == me:
                    mine[key] = index, part
                    grad, state = buffers[part.key], self.states[part.key]
                    running[key] = self.partitions[key].step(grad, state, shared, number, index, submatrix.edges)
                    resume(key, None)
        for turn in range(max(len(self.collectives[key]) for key in submatrices)):
            outgoing: list[list[Tensor]] = [[] for _ in range(size)]
            incoming: list[list[Tensor]] = [[] for _ in range(size)]
            arrived: dict[Key, list[Tensor]] = {}
            for key, (index, _) in mine.items():
                if turn >= len(self.collectives[key]):
                    continue
                collective, tensor = self.collectives[key][turn], waiting.pop(key)
                assert tensor.dtype == collective.dtype, (key, turn)
                pieces = arrived[key] = []
                for other, part in enumerate(self.sharded[key].parts):
                    outgoing[part.rank].append(as_bytes(collective.outgoing(tensor, other)))
                    pieces.append(tensor.new_empty(collective.arriving(index, other)))
                    incoming[part.rank].append(as_bytes(pieces[-1]))
            targets = [[(lambda t=t: t) for t in items] for items in incoming]
            counts = [[t.numel() for t in items] for items in incoming]
            exchange.start(outgoing, targets, counts, "between shards", torch.uint8).finish()
            for key, pieces in arrived.items():
                resume(key, self.collectives[key][turn].joined(pieces))
        for _, part in mine.values():
            self._begin(part.key, self.states[part.key])
        return done


def _numel(part: ComputeShard) -> int:
    rows, cols = part.buffer_shape
    return rows * cols
