"""Parts, what one rank computes of a matrix, and submatrices, the rectangles of a matrix that need nothing of each other."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_opt.layout.region import Region
from megatron_opt.optimizers.base import MatrixInfo


@dataclass(frozen=True)
class ComputeShard:
    """What one rank computes: [start, stop) of side `dim` of a submatrix, which is the whole matrix where none is given."""

    matrix: str
    index: int  # among the matrix's parts
    rank: int
    dim: int
    start: int
    stop: int
    shape: tuple[int, int]  # of the matrix
    submatrix: Region | None = None

    @functools.cached_property
    def area(self) -> Region:
        """The submatrix's rectangle."""
        return self.submatrix or Region(0, self.shape[0], 0, self.shape[1])

    @functools.cached_property
    def bounds(self) -> Region:
        """The part's rectangle."""
        r0, r1, c0, c1 = self.area
        return Region(self.start, self.stop, c0, c1) if self.dim == 0 else Region(r0, r1, self.start, self.stop)

    @property
    def buffer_shape(self) -> tuple[int, int]:
        return self.bounds.shape

    @property
    def key(self) -> tuple[str, int]:
        return self.matrix, self.index


@dataclass(frozen=True)
class Submatrix:
    """A rectangle of a matrix that is computed apart from the rest of it, in one part or in shards on several ranks."""

    parts: tuple[ComputeShard, ...]

    @property
    def key(self) -> tuple[str, int]:
        """Of its first part, whose rank holds what exists once for the submatrix."""
        return self.parts[0].key

    @property
    def area(self) -> Region:
        return self.parts[0].area

    @property
    def is_whole(self) -> bool:
        """Whether the submatrix is all of its matrix."""
        return self.parts[0].submatrix is None

    @property
    def edges(self) -> tuple[int, ...]:
        """Where the cut side is cut, counted from the submatrix's own first row or column."""
        first = self.parts[0].start
        return (0, *[part.stop - first for part in self.parts])

    def info(self, whole: MatrixInfo) -> MatrixInfo:
        """The matrix as its rule sees this submatrix of it."""
        return whole if self.is_whole else with_shape(whole, self.area.shape)


def shape2d(info: MatrixInfo) -> tuple[int, int]:
    """(rows, columns); a vector is one column."""
    return (info.shape[0], info.shape[1]) if len(info.shape) == 2 else (info.shape[0], 1)


def with_shape(info: MatrixInfo, shape: tuple[int, int]) -> MatrixInfo:
    """A matrix, or a vector of one column, of another size."""
    return replace(info, shape=shape[: len(info.shape)])


def submatrices_of(parts: Iterable[ComputeShard]) -> list[Submatrix]:
    """The submatrices of parts, matrices and submatrices in the order of their first part."""
    parts_of_submatrix: dict[tuple[str, Region], list[ComputeShard]] = {}
    for part in parts:
        parts_of_submatrix.setdefault((part.matrix, part.area), []).append(part)
    return [Submatrix(tuple(sorted(several, key=lambda part: part.start))) for several in parts_of_submatrix.values()]
