"""Matrices of one call grouped by the shape of their blocks: what steps together."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.blocks import Grid

SMALL = 128  # a block of longer sides fills the machine by itself


@dataclass
class BlockBatch:
    """Regions of equal blocks that step together."""

    shape: tuple[int, int]  # of a block
    kind: tuple[Any, ...]  # what the rule told them apart by
    whole: bool  # whether each is a whole matrix
    members: list[tuple[int, int]]  # (matrix, region)

    def part(self, members: list[tuple[int, int]]) -> "BlockBatch":
        """Some of them."""
        return BlockBatch(self.shape, self.kind, self.whole, members)

    def names(self, parts: Sequence[Tensor], infos: Sequence[MatrixInfo]) -> list[str]:
        """Of each block's matrix; `parts` are (b, c) or (B, b, c) for each member."""
        counts = [1 if part.ndim == 2 else len(part) for part in parts]
        return [infos[index].name for (index, _), count in zip(self.members, counts) for _ in range(count)]


@dataclass
class Plan:
    """The batches of a call and its matrices of several blocks."""

    infos: list[MatrixInfo]
    types: list[tuple[torch.dtype, torch.device]]
    batches: list[BlockBatch]
    cut: list[int]


class Planner:
    """Plans by call; `grid` are a matrix's blocks, matrices of another `kind` are not of one batch."""

    def __init__(self, grid: Callable[[MatrixInfo], Grid], kind: Callable[[MatrixInfo], tuple[Hashable, ...]]) -> None:
        self.grid, self.kind = grid, kind
        self.known: dict[str, Plan] = {}  # by the first matrix

    def __call__(self, grads: Sequence[Tensor], infos: Sequence[MatrixInfo]) -> Plan:
        """The plan; found again where the last call with this first matrix had the same ones."""
        types, infos = [(grad.dtype, grad.device) for grad in grads], list(infos)
        known = self.known.get(infos[0].name) if infos else None
        if known is not None and known.types == types and known.infos == infos:
            return known
        batches: dict[tuple[Hashable, ...], BlockBatch] = {}
        cut = []
        for index, (type_of, info) in enumerate(zip(types, infos)):
            shapes, kind = self.grid(info).shapes(), self.kind(info)
            whole = len(shapes) == 1 and shapes[0][0] == 1
            if not whole:
                cut.append(index)
            for region, (_, rows, columns) in enumerate(shapes):
                alone = (index, region) if max(rows, columns) > SMALL else ()
                key = (rows, columns, kind, whole, *type_of, *alone)
                batches.setdefault(key, BlockBatch((rows, columns), kind, whole, [])).members.append((index, region))
        plan = Plan(infos, types, list(batches.values()), cut)
        if infos:
            self.known[infos[0].name] = plan
        return plan
