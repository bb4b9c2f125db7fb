"""Moves rectangles of logical matrices between the ranks that hold their shards and the ranks that compute them.

A route is worked out once, alike on every rank, from who holds what and who computes what. A trip is one all-to-all
in which each pair of ranks sends one flat message; what a rank needs from itself is copied and never sent.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.fragments import Rect
from megatron_opt.distributed.parts import Part
from megatron_opt.kernels.copies import copy_all
from megatron_opt.optimizers.slices import Leg


@dataclass(frozen=True)
class Item:
    """One rectangle on its way: rows and columns relative to the held rectangle and to the part's slab."""

    fragment: int  # index on the holder
    offset: int  # of the held rectangle in the fragment
    held: tuple[int, int]  # its shape
    inside: tuple[int, int, int, int]  # what of it travels
    part: tuple[str, int]
    slab: tuple[int, int, int, int]  # where it lies in the slab

    @property
    def numel(self) -> int:
        r0, r1, c0, c1 = self.inside
        return (r1 - r0) * (c1 - c0)

    def of_fragment(self, flat: Tensor) -> Tensor:
        rows, cols = self.held
        r0, r1, c0, c1 = self.inside
        if c1 - c0 == cols:  # whole rows: contiguous
            return flat[self.offset + r0 * cols : self.offset + r1 * cols].view(r1 - r0, cols)
        return flat[self.offset : self.offset + rows * cols].view(rows, cols)[r0:r1, c0:c1]

    def of_slab(self, slab: Tensor) -> Tensor:
        r0, r1, c0, c1 = self.slab
        return slab[r0:r1, c0:c1]


def _update_of(item: Item, updates: Sequence[Tensor]) -> Tensor:
    return item.of_fragment(updates[item.fragment])


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


# One rank's holdings: (fragment index, rectangle) of every rectangle that it holds.
Holdings = list[tuple[int, Rect]]


def _meet(rect: Rect, part: Part) -> tuple[int, int, int, int] | None:
    r0, r1, c0, c1 = part.bounds
    row0, row1 = max(rect.row0, r0), min(rect.row1, r1)
    col0, col1 = max(rect.col0, c0), min(rect.col1, c1)
    return (row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None


def _empty(size: int) -> list[list[Item]]:
    return [[] for _ in range(size)]


def find_routes(
    holdings: Sequence[Holdings], parts: Sequence[Part], rank: int, buckets: Sequence[Sequence[str]]
) -> list[Route]:
    """Routes of one rank, one per bucket of matrices."""
    size = len(holdings)
    by_matrix: dict[str, list[Part]] = {}
    for part in parts:
        by_matrix.setdefault(part.matrix, []).append(part)
    where = {name: index for index, bucket in enumerate(buckets) for name in bucket}
    held: dict[str, dict[tuple[Any, ...], list[tuple[int, int, Rect]]]] = {}
    for holder, rects in enumerate(holdings):
        for fragment, rect in rects:
            if rect.matrix in where:
                held.setdefault(rect.matrix, {}).setdefault(rect.place, []).append((holder, fragment, rect))
    routes = [Route(_empty(size), _empty(size), _empty(size), _empty(size)) for _ in buckets]
    for name in sorted(held):
        route = routes[where[name]]
        for place in sorted(held[name]):
            holders = held[name][place]
            for part in by_matrix[name]:
                met = _meet(holders[0][2], part)
                if met is None:
                    continue
                own = [entry for entry in holders if entry[0] == part.rank]
                source = own[0] if own else holders[part.rank % len(holders)]
                for entry in holders:
                    holder, fragment, rect = entry
                    if rank not in (holder, part.rank):
                        continue
                    item = _item(rect, fragment, part, met)
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


def _item(rect: Rect, fragment: int, part: Part, met: tuple[int, int, int, int]) -> Item:
    row0, row1, col0, col1 = met
    r0, _, c0, _ = part.bounds
    return Item(
        fragment=fragment,
        offset=rect.offset,
        held=(rect.row1 - rect.row0, rect.col1 - rect.col0),
        inside=(row0 - rect.row0, row1 - rect.row0, col0 - rect.col0, col1 - rect.col0),
        part=part.key,
        slab=(row0 - r0, row1 - r0, col0 - c0, col1 - c0),
    )


def wires(legs: Iterable[Sequence[Leg]]) -> list[torch.dtype]:
    """The dtype of each round of exchanges between the slices of several matrices: the widest that takes part."""
    return [
        functools.reduce(torch.promote_types, (leg.dtype for leg in turn if leg is not None))
        for turn in itertools.zip_longest(*legs)
    ]


@dataclass
class Traffic:
    """Bytes that this rank has sent to others, by what they were for."""

    sent: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, count: int) -> None:
        self.sent[what] = self.sent.get(what, 0) + count

    def total(self) -> int:
        return sum(self.sent.values())


class Trip:
    """An all-to-all under way; `finish` waits and hands out what arrived."""

    def __init__(self, work: Any, received: Tensor | None, places: list[tuple[Callable[[], Tensor], int]]) -> None:
        self._work, self._received, self._places = work, received, places

    def finish(self) -> None:
        """Wait, then copy every message to its place."""
        if self._work is not None:
            self._work.wait()
        if self._received is None:
            return
        targets = [place() for place, _ in self._places]
        arrived = self._received.split([count for _, count in self._places])
        copy_all(targets, [piece.view(target.shape) for piece, target in zip(arrived, targets, strict=True)])


class Exchange:
    """All-to-all trips over one process group (None where the group is this rank alone)."""

    def __init__(self, group: Any, rank: int, size: int, wire: torch.dtype = torch.float32) -> None:
        self.group, self.rank, self.size, self.wire = group, rank, size, wire
        self.traffic = Traffic()

    def start(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[Callable[[], Tensor]]],
        counts: Sequence[Sequence[int]],
        what: str,
        wire: torch.dtype | None = None,
    ) -> Trip:
        """Send tensors `outgoing[d]` to rank d and put what comes from rank s into `incoming[s]`, sizes `counts[s]`."""
        copy_all([place() for place in incoming[self.rank]], outgoing[self.rank])
        if self.size == 1:
            return Trip(None, None, [])
        wire = wire or self.wire
        others = [r for r in range(self.size) if r != self.rank]
        send = [t for r in others for t in outgoing[r]]
        in_splits = [sum(t.numel() for t in outgoing[r]) if r != self.rank else 0 for r in range(self.size)]
        out_splits = [sum(counts[r]) if r != self.rank else 0 for r in range(self.size)]
        device = send[0].device if send else torch.device(torch.cuda.current_device())  # an index on CUDA
        message = torch.empty(sum(in_splits), dtype=wire, device=device)
        pieces = message.split([t.numel() for t in send])
        copy_all([piece.view(t.shape) for piece, t in zip(pieces, send, strict=True)], send)
        received = torch.empty(sum(out_splits), dtype=wire, device=device)
        self.traffic.add(what, message.numel() * message.element_size())
        work = dist.all_to_all_single(received, message, out_splits, in_splits, group=self.group, async_op=True)
        places = [(place, count) for r in others for place, count in zip(incoming[r], counts[r], strict=True)]
        return Trip(work, received, places)

    def gather(
        self,
        route: Route,
        grads: Sequence[Tensor],
        slabs: dict[tuple[str, int], Tensor],
        what: str = "gradients to owners",
        wire: torch.dtype | None = None,
    ) -> Trip:
        """Shards of gradients to the parts that need them."""
        return self.start(
            [[item.of_fragment(grads[item.fragment]) for item in items] for items in route.gather_out],
            [[lambda item=item: item.of_slab(slabs[item.part]) for item in items] for items in route.gather_in],  # type: ignore[misc]
            [[item.numel for item in items] for items in route.gather_in],
            what,
            wire,
        )

    def scatter(
        self,
        route: Route,
        slabs: dict[tuple[str, int], Tensor],
        updates: Sequence[Tensor],
        what: str = "updates to shards",
        wire: torch.dtype | None = None,
    ) -> Trip:
        """Updates of parts back to every rank that holds a shard of them."""
        return self.start(
            [[item.of_slab(slabs[item.part]) for item in items] for items in route.scatter_out],
            [[functools.partial(_update_of, item, updates) for item in items] for items in route.scatter_in],
            [[item.numel for item in items] for items in route.scatter_in],
            what,
            wire,
        )
