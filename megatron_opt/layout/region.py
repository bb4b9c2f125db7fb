"""A rectangle of a matrix."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Region(NamedTuple):
    """Rows [row0, row1) and columns [col0, col1) of a matrix; a vector is one column."""

    row0: int
    row1: int
    col0: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.row1 - self.row0, self.col1 - self.col0

    @property
    def numel(self) -> int:
        """Elements."""
        return (self.row1 - self.row0) * (self.col1 - self.col0)

    def intersect(self, other: "Region") -> "Region | None":
        """What both have, or None where that is nothing."""
        row0, row1 = max(self.row0, other.row0), min(self.row1, other.row1)
        col0, col1 = max(self.col0, other.col0), min(self.col1, other.col1)
        return Region(row0, row1, col0, col1) if row0 < row1 and col0 < col1 else None

    def relative_to(self, outer: "Region") -> "Region":
        """The same rectangle, counted from another's first row and column."""
        return Region(self.row0 - outer.row0, self.row1 - outer.row0, self.col0 - outer.col0, self.col1 - outer.col0)

    def of(self, matrix: Any) -> Any:
        """This part of a tensor of the matrix."""
        return matrix[self.row0 : self.row1, self.col0 : self.col1]


def cover_matrix(regions: Iterable[Region], shape: tuple[int, int]) -> bool:
    """Whether regions cover a matrix (rows, columns) exactly once."""
    ordered, active, row = sorted(regions, reverse=True), list[Region](), 0
    while row < shape[0]:
        active = [region for region in active if region.row1 > row]
        while ordered and ordered[-1].row0 == row:
            active.append(ordered.pop())
        if not cover_once([(region.col0, region.col1) for region in active], shape[1]):
            return False
        row = min([region.row1 for region in active] + [region.row0 for region in ordered[-1:]])
    return not ordered and row == shape[0]


def cover_once(spans: list[tuple[int, int]], length: int) -> bool:
    """Whether intervals [start, stop) cover [0, length) exactly once."""
    edge = 0
    for start, stop in sorted(spans):
        if start != edge or stop <= start:
            return False
        edge = stop
    return edge == length
