"""Jobs: matrices to place, and where they may be cut.

A matrix is a grid of tiles that need nothing of each other; a tile may be cut into shards whose ranks exchange while they
step. Units of a job count the tiles row by row, and within each tile the rows or columns of the side that may be cut.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from megatron_opt.distributed.compute_shards import ComputeShard, shape2d, with_shape
from megatron_opt.layout.region import Region
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.partition import Collective, Partition

Run = tuple[int, int, int]  # rank, and the first and last place of what it gets


def load_of(cost: Cost) -> float:
    """What packing balances: FLOPs per step, with memory traffic counted at 10 FLOPs a byte."""
    return cost.mean_flops() + 10.0 * cost.elementwise_bytes + 1.0


@dataclass(frozen=True)
class Weight:
    """Load and bytes of state of a tile: for each place in it, and once with its first place."""

    load: float
    state: float
    first_load: float = 0.0
    first_state: float = 0.0


@dataclass(frozen=True)
class Job:
    """A matrix to place: (rows, columns) of it and of its tiles, the side of a tile that may be cut, and costs."""

    matrix: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    shard_dim: int | None
    cost: Cost
    submatrix_cost: Callable[[tuple[int, int]], Cost]  # of a rectangle of whole tiles
    shard_costs: Callable[[tuple[int, int], tuple[int, ...]], list[Cost]]  # of a tile
    collectives: Callable[[tuple[int, int], tuple[int, ...]], Sequence[Collective]]  # of a tile's shards
    weights: dict[tuple[int, int], Weight] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(info: MatrixInfo, optimizer: MatrixOptimizer, cost: Cost | None = None) -> "Job":
        """The job of a matrix under its rule."""
        shape = shape2d(info)

        def partition(submatrix: tuple[int, int]) -> Partition:
            made = optimizer.partition(with_shape(info, submatrix))
            assert made is not None
            return made

        whole = optimizer.partition(info)
        return Job(
            info.name,
            shape,
            (whole.tile if whole else None) or shape,
            whole.shard_dim if whole else None,
            cost or optimizer.cost(info),
            functools.cache(lambda submatrix: optimizer.cost(with_shape(info, submatrix))),
            functools.cache(lambda submatrix, edges: partition(submatrix).costs(edges)),
            lambda submatrix, edges: partition(submatrix).collectives(edges),
        )

    @property
    def load(self) -> float:
        """Of the whole matrix."""
        return load_of(self.cost)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.shape[0] // self.tile[0]), -(-self.shape[1] // self.tile[1])

    @property
    def depth(self) -> int:
        """Units in a tile: itself, or rows or columns of it that may go to different ranks."""
        return 1 if self.shard_dim is None else self.shape[self.shard_dim]

    @property
    def units(self) -> int:
        """Units in the matrix."""
        rows, columns = self.grid
        return rows * columns * self.depth

    def area(self, first: int, last: int) -> Region:
        """The rectangle from one tile to another."""
        columns = self.grid[1]
        (row, column), (last_row, last_column) = divmod(first, columns), divmod(last, columns)
        return Region(
            row * self.tile[0], min(self.shape[0], (last_row + 1) * self.tile[0]),
            column * self.tile[1], min(self.shape[1], (last_column + 1) * self.tile[1]),
        )  # fmt: skip

    def weigh(self, tile: int) -> Weight:
        """What a tile weighs."""
        shape = self.area(tile, tile).shape
        if shape not in self.weights:
            cost, depth = self.submatrix_cost(shape), self.depth
            weight = Weight(load_of(cost), cost.state_bytes)
            if depth > 1:
                rest = self.shard_costs(shape, (0, depth - depth // 2, depth))[1]
                load, state = load_of(rest) / (depth // 2), rest.state_bytes / (depth // 2)
                weight = Weight(load, state, load_of(cost) - load * depth, cost.state_bytes - state * depth)
            self.weights[shape] = weight
        return self.weights[shape]

    def parts(self, runs: Sequence[Run]) -> list[tuple[ComputeShard, Cost]]:
        """Parts for runs in ascending order that cover all units, and their costs."""
        depth, side = self.depth, self.shard_dim or 0
        submatrices: list[
            tuple[Region, list[Run]]
        ] = []  # rows or columns of a submatrix by rank, counted from its first
        sharded: dict[int, list[Run]] = {}
        for rank, start, stop in runs:
            (first, low), (last, high) = divmod(start, depth), divmod(stop, depth)
            if low and first < last:
                sharded.setdefault(first, []).append((rank, low, depth))
                first, low = first + 1, 0
            if high and first <= last:
                sharded.setdefault(last, []).append((rank, low if first == last else 0, high))
            for area in self._rectangles(first, last):
                submatrices.append((area, [(rank, 0, area.shape[side])]))
        submatrices += [(self.area(tile, tile), pieces) for tile, pieces in sharded.items()]
        made: list[tuple[ComputeShard, Cost]] = []
        for area, pieces in sorted(submatrices, key=lambda submatrix: (submatrix[0][0], submatrix[0][2])):
            shape, first = area.shape, area[2 * side]
            submatrix = None if shape == self.shape else area
            if len(pieces) > 1:
                costs = self.shard_costs(shape, (0, *[high for _, _, high in pieces]))
            else:
                costs = [self.submatrix_cost(shape) if submatrix else self.cost]
            for (rank, low, high), cost in zip(pieces, costs, strict=True):
                made.append(
                    (
                        ComputeShard(
                            self.matrix, len(made), rank, side, first + low, first + high, self.shape, submatrix
                        ),
                        cost,
                    )
                )
        return made

    def _rectangles(self, first: int, stop: int) -> list[Region]:
        """Tiles [first, stop), row by row, as few rectangles."""
        columns, regions = self.grid[1], []
        while first < stop:
            column = first % columns
            if column or stop - first < columns:
                count = min(columns - column, stop - first)
            else:
                count = (stop - first) // columns * columns
            regions.append(self.area(first, first + count - 1))
            first += count
        return regions


def even(job: Job, ranks: int) -> list[Run]:
    """Nearly equal runs on all ranks, none empty."""
    count = min(ranks, job.units)
    edges = [job.units * rank // count for rank in range(count + 1)]
    return [(rank, *edge) for rank, edge in enumerate(pairwise(edges))]
