"""Moves rectangles of logical matrices between the ranks that hold their shards and the ranks that compute them.

A route is worked out once, alike on every rank, from who holds what and who computes what. A transfer is one all-to-all
in which each pair of ranks sends one flat message; what a rank needs from itself is copied and never sent.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.compute_shards import ComputeShard
from megatron_opt.distributed.param_shards import Rect
from megatron_opt.kernels.copies import copy_all
from megatron_opt.kernels.host import current_device
from megatron_opt.layout.region import Region


@dataclass(frozen=True)
class Item:
    """One region on its way between a parameter shard and a part."""

    param_shard: int  # index on the holder
    offset: int  # of the rectangle in the parameter shard
    shape: tuple[int, int]  # of that rectangle
    inside: Region  # what of it travels, counted from its corner
    part: tuple[str, int]
    buffer: Region  # where it lies in the part

    @property
    def numel(self) -> int:
        return self.inside.numel

    def of_param_shard(self, flat: Tensor) -> Tensor:
        rows, cols = self.shape
        r0, r1, c0, c1 = self.inside
        if c1 - c0 == cols:  # whole rows: contiguous
            return flat[self.offset + r0 * cols : self.offset + r1 * cols].view(r1 - r0, cols)
        return self.inside.of(flat[self.offset : self.offset + rows * cols].view(rows, cols))

    def of_buffer(self, buffer: Tensor) -> Tensor:
        return self.buffer.of(buffer)


def _update_of(item: Item, updates: Sequence[Tensor]) -> Tensor:
    return item.of_param_shard(updates[item.param_shard])


@dataclass
class Route:
    """Items between this rank and every other, in an order that both sides derive alike.

    `gather_out[d]` are this rank's items that the parts on rank d need, `gather_in[s]` what this rank's parts need from
    rank s; `scatter_out[d]`, `scatter_in[s]` are the way back, on which every replica of a shard gets its copy.
    """

    gather_out: list[list[Item]]
    gather_in: list[list[Item]]
    scatter_out: list[list[Item]]
    scatter_in: list[list[Item]]


# One rank's holdings: (parameter shard index, rectangle) of every rectangle that it holds.
Holdings = list[tuple[int, Rect]]


def _empty(size: int) -> list[list[Item]]:
    return [[] for _ in range(size)]


def find_routes(
    holdings: Sequence[Holdings],
    parts: Sequence[ComputeShard],
    rank: int,
    buckets: Sequence[Sequence[str]],
    near: int = 0,
) -> list[Route]:
    """Routes of one rank, one per bucket of matrices; gradients come from among the owner's own `near` ranks (0: of all)."""
    size = len(holdings)
    near = near or size
    by_matrix: dict[str, list[ComputeShard]] = {}
    for part in parts:
        by_matrix.setdefault(part.matrix, []).append(part)
    where = {name: index for index, bucket in enumerate(buckets) for name in bucket}
    rects_of: dict[str, dict[Region, list[tuple[int, int, Rect]]]] = {}
    for holder, rects in enumerate(holdings):
        for param_shard, rect in rects:
            if rect.matrix in where:
                rects_of.setdefault(rect.matrix, {}).setdefault(rect.region, []).append((holder, param_shard, rect))
    routes = [Route(_empty(size), _empty(size), _empty(size), _empty(size)) for _ in buckets]
    for name in sorted(rects_of):
        route = routes[where[name]]
        for region, holders in sorted(rects_of[name].items()):
            for part in by_matrix[name]:
                met = region.intersect(part.bounds)
                if met is None:
                    continue
                own = [entry for entry in holders if entry[0] == part.rank]
                around = [entry for entry in holders if entry[0] // near == part.rank // near]
                source = own[0] if own else around[part.rank % len(around)]
                for entry in holders:
                    holder, param_shard, rect = entry
                    if rank not in (holder, part.rank):
                        continue
                    item = _item(rect, param_shard, part, met)
                    if entry is source:
                        if holder == rank:
                            route.gather_out[part.rank].append(item)
                        if part.rank == rank:
                            route.gather_in[holder].append(item)
                    if part.rank == rank:
                        route.scatter_out[holder].append(item)
                    if holder == rank:
                        route.scatter_in[part.rank].append(item)
    return routes


def _item(rect: Rect, param_shard: int, part: ComputeShard, met: Region) -> Item:
    inside, buffer = met.relative_to(rect.region), met.relative_to(part.bounds)
    return Item(param_shard, rect.offset, rect.region.shape, inside, part.key, buffer)


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements as they lie, to travel with others of other types."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@dataclass
class Traffic:
    """Bytes that this rank has sent to others, by what they were for."""

    sent: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int) -> None:
        self.sent[what] = self.sent.get(what, 0) + count

    def total(self) -> int:
        return sum(self.sent.values())


class AsyncTransfer:
    """An all-to-all under way; `finish` waits and hands out what arrived."""

    def __init__(self, work: Any, received: Tensor | None, targets: list[tuple[Callable[[], Tensor], int]]) -> None:
        self._work, self._received, self._targets = work, received, targets

    def finish(self) -> None:
        """Wait, then copy every message to its place."""
        if self._work is not None:
            self._work.wait()
        if self._received is None:
            return
        targets = [find_target() for find_target, _ in self._targets]
        arrived = self._received.split([count for _, count in self._targets])
        copy_all(targets, [piece.view(target.shape) for piece, target in zip(arrived, targets, strict=True)])


class Exchange:
    """All-to-all transfers over one process group (None where the group is this rank alone)."""

    def __init__(
        self,
        group: Any,
        rank: int,
        size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.group, self.rank, self.size, self.dtype, self.device = group, rank, size, dtype, device
        self.traffic = Traffic()

    def start(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[Callable[[], Tensor]]],
        counts: Sequence[Sequence[int]],
        what: str,
        dtype: torch.dtype | None = None,
    ) -> AsyncTransfer:
        """Send tensors `outgoing[d]` to rank d and put what comes from rank s into `incoming[s]`, sizes `counts[s]`."""
        copy_all([target() for target in incoming[self.rank]], outgoing[self.rank])
        if self.size == 1:
            return AsyncTransfer(None, None, [])
        dtype = dtype or self.dtype
        others = [r for r in range(self.size) if r != self.rank]
        send = [t for r in others for t in outgoing[r]]
        in_splits = [sum(t.numel() for t in outgoing[r]) if r != self.rank else 0 for r in range(self.size)]
        out_splits = [sum(counts[r]) if r != self.rank else 0 for r in range(self.size)]
        device = send[0].device if send else self.device or current_device()
        message = torch.empty(sum(in_splits), dtype=dtype, device=device)
        pieces = message.split([t.numel() for t in send])
        copy_all([piece.view(t.shape) for piece, t in zip(pieces, send, strict=True)], send)
        received = torch.empty(sum(out_splits), dtype=dtype, device=device)
        self.traffic.add(what, message.numel() * message.element_size())
        work = dist.all_to_all_single(received, message, out_splits, in_splits, group=self.group, async_op=True)
        targets = [(target, count) for r in others for target, count in zip(incoming[r], counts[r], strict=True)]
        return AsyncTransfer(work, received, targets)

    def gather(
        self,
        route: Route,
        grads: Sequence[Tensor],
        buffers: dict[tuple[str, int], Tensor],
        what: str = "gradients to owners",
    ) -> AsyncTransfer:
        """Shards of gradients to the parts that need them."""
        return self.start(
            [[item.of_param_shard(grads[item.param_shard]) for item in items] for items in route.gather_out],
            [[lambda item=item: item.of_buffer(buffers[item.part]) for item in items] for items in route.gather_in],  # type: ignore[misc]
            [[item.numel for item in items] for items in route.gather_in],
            what,
        )

    def scatter(
        self,
        route: Route,
        buffers: dict[tuple[str, int], Tensor],
        updates: Sequence[Tensor],
        what: str = "updates to shards",
        dtype: torch.dtype | None = None,
    ) -> AsyncTransfer:
        """Updates of parts back to every rank that holds a shard of them; in `dtype` where it is not --exchange-dtype's."""
        return self.start(
            [[item.of_buffer(buffers[item.part]) for item in items] for items in route.scatter_out],
            [[functools.partial(_update_of, item, updates) for item in items] for items in route.scatter_in],
            [[item.numel for item in items] for items in route.scatter_in],
            what,
            dtype,
        )
