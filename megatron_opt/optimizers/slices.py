"""Slices of one matrix on several ranks: what they exchange while they step together, and how sides are cut."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SliceStep = Generator[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Leg:
    """One exchange of tensors (n, width) whose rows [edges[i], edges[i+1]) are slice i's block.

    To reduce, every slice gives n rows and gets the sum of its block; to gather, it gives its block and gets n rows.
    """

    reduce: bool
    edges: tuple[int, ...]
    width: int
    dtype: torch.dtype

    def rows(self, index: int) -> int:
        """Rows of a slice's block."""
        return self.edges[index + 1] - self.edges[index]

    def outgoing(self, tensor: Tensor, to: int) -> Tensor:
        """What of a slice's tensor slice `to` needs."""
        return tensor[self.edges[to] : self.edges[to + 1]] if self.reduce else tensor

    def arriving(self, index: int, source: int) -> tuple[int, int]:
        """Shape of what slice `index` gets from slice `source`."""
        return self.rows(index if self.reduce else source), self.width

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """What a slice goes on with, from the pieces of all slices in their order."""
        if not self.reduce:
            return torch.cat(list(pieces))
        total = pieces[0]
        for piece in pieces[1:]:
            total = total + piece
        return total

    def sent(self, index: int) -> int:
        """Elements that a slice sends to the others."""
        mine, others = self.rows(index), len(self.edges) - 2
        return (self.edges[-1] - mine if self.reduce else mine * others) * self.width


def in_proportion(length: int, edges: Sequence[int]) -> tuple[int, ...]:
    """Cut [0, length) as `edges` cuts their own side."""
    return tuple(round(length * edge / edges[-1]) for edge in edges)


def to_first(length: int, count: int) -> tuple[int, ...]:
    """Edges that give everything to slice 0 of `count`."""
    return (0, *[length] * count)


def shares(edges: Sequence[int]) -> list[float]:
    """Each slice's share of the side."""
    return [(stop - start) / edges[-1] for start, stop in pairwise(edges)]
