"""One matrix on several ranks: tiles that need nothing of each other, shards of a tile that step together.

An optimizer that allows it returns a `Partition`; see `MatrixOptimizer.partition`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_opt.optimizers.base import Cost, MatrixInfo, State

ShardStep = Generator[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Collective:
    """A reduce-scatter or all-gather of tensors (n, width) whose rows [edges[i], edges[i+1]) are shard i's block.

    To reduce and scatter, every shard gives n rows and gets the sum of its block; to gather, it gives its block and
    gets n rows. Tensors have this dtype and travel in it.
    """

    reduces: bool
    edges: tuple[int, ...]
    width: int
    dtype: torch.dtype

    def rows(self, index: int) -> int:
        """Rows of a shard's block."""
        return self.edges[index + 1] - self.edges[index]

    def outgoing(self, tensor: Tensor, to: int) -> Tensor:
        """What of a shard's tensor shard `to` needs."""
        return tensor[self.edges[to] : self.edges[to + 1]] if self.reduces else tensor

    def arriving(self, index: int, source: int) -> tuple[int, int]:
        """Shape of what shard `index` gets from shard `source`."""
        return self.rows(index if self.reduces else source), self.width

    def joined(self, received: Sequence[Tensor]) -> Tensor:
        """What a shard goes on with, from what it got of all shards in their order."""
        if not self.reduces:
            return torch.cat(list(received))
        total = received[0]
        for more in received[1:]:
            total = total + more
        return total

    def sent_bytes(self, index: int) -> int:
        """Bytes that a shard sends to the others."""
        mine, others = self.rows(index), len(self.edges) - 2
        return (self.edges[-1] - mine if self.reduces else mine * others) * self.width * self.dtype.itemsize


def reduce_scatter(edges: tuple[int, ...], width: int, dtype: torch.dtype) -> Collective:
    """Every shard gives (n, width) and gets the sum of its own rows."""
    return Collective(True, edges, width, dtype)


def all_gather(edges: tuple[int, ...], width: int, dtype: torch.dtype) -> Collective:
    """Every shard gives its own rows and gets (n, width)."""
    return Collective(False, edges, width, dtype)


def all_reduce(count: int, width: int, dtype: torch.dtype) -> Collective:
    """Each of `count` shards gives one row and gets all (count, width), to sum them in their order."""
    return all_gather(tuple(range(count + 1)), width, dtype)


@dataclass(frozen=True)
class Partition:
    """How one matrix may be computed in parts; `info` is the matrix, or a submatrix: a rectangle of whole tiles of one.

    Tiles of `tile` = (rows, columns), a vector being one column, need nothing of each other (None: the matrix is one),
    so that a submatrix is stepped by `optimizer` as a matrix of its own. A tile may besides be cut along side `shard_dim` (0
    or 1, None: it may not) into shards whose ranks step together and exchange what `collectives` says; `update` on the
    whole equals all shards' steps together. The whole's state is the union of the shards' (cut along the same side, in
    proportion) and the shared one, and the matrix's that of its submatrices; stacks of blocks go where `block_positions` says.
    The caller fills states of kind NORM, and scales directions of optimizers that project to the whole's norm. No part
    sees a matrix without a gradient.
    """

    optimizer: Any  # a MatrixOptimizer: of a wrapped one, what it wraps
    info: "MatrixInfo"
    tile: tuple[int, int] | None = None
    shard_dim: int | None = None
    surcharge: "Callable[[Cost, float], Cost] | None" = (
        None  # of a shard and its elements: what the caller does besides
    )

    def init_shard(self, weight: Tensor) -> "State":
        """State that travels with one shard of the weight; by default the optimizer's for a weight of fewer rows or columns."""
        state: State = self.optimizer.init_state(weight, self.info)
        return state

    def init_shared(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "State":
        """State that exists once per matrix (factors, bases), with shard 0; empty by default."""
        return {}

    def collectives(self, edges: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Collective]:
        """What shards [edges[i], edges[i+1]) of the cut side exchange in a step with gradients of `dtype`, in order."""
        return []

    def step(
        self, grad: Tensor, state: "State", shared: "State", step: int, index: int, edges: tuple[int, ...]
    ) -> ShardStep:
        """Shard `index`'s direction: yields what it gives to each of `collectives`, is sent what it gets, returns it.

        `shared` is empty but for shard 0. By default the optimizer's own step, without exchanges.
        """
        yield from ()
        (direction,) = self.optimizer.update([grad.contiguous()], [state], step, [self.info])
        return direction

    def block_positions(self, corner: tuple[int, int], shape: tuple[int, int]) -> dict[str, tuple[str, list[int], int]]:
        """Of each stack of blocks in a submatrix's state: its key in the matrix's state, its blocks' numbers there, of how many.

        `corner` is the submatrix's first row and column.
        """
        return {}

    def shard_costs(self, edges: tuple[int, ...]) -> "list[Cost]":
        """What each shard costs the optimizer; in proportion by default."""
        whole = self.optimizer.cost(self.info)
        return [whole.scaled(share) for share in shares(edges)]

    def costs(self, edges: tuple[int, ...]) -> "list[Cost]":
        """What each shard costs in all."""
        costs = self.shard_costs(edges)
        if self.surcharge is None:
            return costs
        numel = self.info.numel
        return [self.surcharge(cost, share * numel) for cost, share in zip(costs, shares(edges), strict=True)]


def in_proportion(length: int, edges: Sequence[int]) -> tuple[int, ...]:
    """Cut [0, length) as `edges` cuts their own side."""
    return tuple(round(length * edge / edges[-1]) for edge in edges)


def to_first(length: int, count: int) -> tuple[int, ...]:
    """Edges that give everything to shard 0 of `count`."""
    return (0, *[length] * count)


def shares(edges: Sequence[int]) -> list[float]:
    """Each shard's share of the side."""
    return [(stop - start) / edges[-1] for start, stop in pairwise(edges)]
