"""Matrices cut into blocks; equal blocks are stacked, so that one batched product serves them all."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int, int]  # start, stop, block


def _spans(length: int, block: int) -> list[Span]:
    """Whole blocks, then the remainder as one smaller block."""
    block = min(block, length) or 1
    whole = length - length % block
    spans = [(0, whole, block)] if whole else []
    return [*spans, (whole, length, length - whole)] if whole < length else spans


@dataclass(frozen=True)
class Grid:
    """A matrix (m, n) as at most four regions of equal blocks."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @classmethod
    def of(cls, shape: Sequence[int], block: Sequence[int]) -> "Grid":
        """Blocks of `block` = (rows, columns), smaller at the ends."""
        return _grid(shape[0], shape[1], block[0], block[1])

    def regions(self) -> list[tuple[Span, Span]]:
        """(rows, columns) of each region."""
        return [(rows, columns) for rows in self.rows for columns in self.columns]

    def shapes(self) -> list[tuple[int, int, int]]:
        """(count, block rows, block columns) of each region."""
        return [((r1 - r0) // rb * ((c1 - c0) // cb), rb, cb) for (r0, r1, rb), (c0, c1, cb) in self.regions()]

    def starts(self) -> list[list[tuple[int, int]]]:
        """First row and column of each block, by region in the order of its stack."""
        return [
            [(row, column) for row in range(r0, r1, rb) for column in range(c0, c1, cb)]
            for (r0, r1, rb), (c0, c1, cb) in self.regions()
        ]

    def find(self, row: int, column: int) -> tuple[int, int]:
        """Region, and number in its stack, of the block that holds an element."""
        for region, ((r0, r1, rb), (c0, c1, cb)) in enumerate(self.regions()):
            if r0 <= row < r1 and c0 <= column < c1:
                return region, (row - r0) // rb * ((c1 - c0) // cb) + (column - c0) // cb
        raise IndexError((row, column))

    def cut(self, x: Tensor) -> list[Tensor]:
        """Stacks (count, block rows, block columns); views where a region is one block."""
        stacks = []
        for (r0, r1, rb), (c0, c1, cb) in self.regions():
            region = x[r0:r1, c0:c1]
            if (r1 - r0, c1 - c0) == (rb, cb):
                stacks.append(region.unsqueeze(0))
            else:
                split = region.reshape((r1 - r0) // rb, rb, (c1 - c0) // cb, cb)
                stacks.append(split.transpose(1, 2).reshape(-1, rb, cb))
        return stacks

    def join(self, stacks: Sequence[Tensor], out: Tensor) -> Tensor:
        """The inverse of `cut`, into `out`; stacks that are views of it are left where they are."""
        for stack, ((r0, r1, rb), (c0, c1, cb)) in zip(stacks, self.regions(), strict=True):
            split = stack.reshape((r1 - r0) // rb, (c1 - c0) // cb, rb, cb).transpose(1, 2)
            whole, region = split.reshape(r1 - r0, c1 - c0), out[r0:r1, c0:c1]
            if whole.data_ptr() != region.data_ptr():
                region.copy_(whole)
        return out


@functools.lru_cache(4096)  # a plan asks for few of them, many times
def _grid(rows: int, columns: int, block_rows: int, block_columns: int) -> Grid:
    return Grid(tuple(_spans(rows, block_rows)), tuple(_spans(columns, block_columns)))


def as_matrix(x: Tensor) -> Tensor:
    """A vector as one column."""
    return x if x.ndim == 2 else x.unsqueeze(-1)


def batched(tensors: Sequence[Tensor]) -> Tensor:
    """Equal blocks (b, c), or stacks of them (B, b, c), as one stack; a view where there is one alone."""
    if tensors[0].ndim == 2:
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def apart(stack: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inverse of `batched`: views of a stack."""
    return stack.unbind() if like[0].ndim == 2 else stack.split([len(part) for part in like])


def put_back(stack: Tensor, parts: Sequence[Tensor]) -> None:
    """What became of a stack to the parts it is of, unless it is a view of them."""
    if len(parts) > 1:
        torch._foreach_copy_(list(parts), list(apart(stack, parts)))
