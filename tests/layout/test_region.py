"""Rectangles against sets of their elements."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.layout.region import Region, cover_matrix, cover_once

edges = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda ends: (min(ends), max(ends) + 1))
regions = st.tuples(edges, edges).map(lambda sides: Region(*sides[0], *sides[1]))


def elements(region: Region) -> set[tuple[int, int]]:
    return {(r, c) for r in range(region.row0, region.row1) for c in range(region.col0, region.col1)}


@given(regions, regions)
def test_what_two_regions_share_is_what_their_elements_share(a: Region, b: Region) -> None:
    common = a.intersect(b)
    assert (set() if common is None else elements(common)) == elements(a) & elements(b)
    assert a.numel == len(elements(a)) == a.shape[0] * a.shape[1]
    moved = a.relative_to(b)
    assert elements(moved) == {(r - b.row0, c - b.col0) for r, c in elements(a)}
    assert moved.shape == a.shape


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6), st.integers(0, 6))
def test_covered_once_is_every_element_counted_once(spans: list[tuple[int, int]], length: int) -> None:
    counts = [0] * 12
    for start, stop in spans:
        for index in range(start, stop):
            counts[index] += 1
    proper = all(start < stop for start, stop in spans)
    assert cover_once(spans, length) == (proper and counts == [1] * length + [0] * (12 - length))


@given(st.lists(regions, max_size=6), st.integers(1, 4), st.integers(1, 4))
def test_a_covered_matrix_has_every_element_once(several: list[Region], rows: int, columns: int) -> None:
    counts = [element for region in several for element in elements(region)]
    wanted = {(r, c) for r in range(rows) for c in range(columns)}
    assert cover_matrix(several, (rows, columns)) == (len(counts) == len(set(counts)) and set(counts) == wanted)


@given(st.lists(st.integers(1, 8), max_size=4), st.lists(st.integers(1, 8), max_size=4), st.data())
def test_a_grid_covers_and_without_one_of_its_regions_does_not(
    rows: list[int], cols: list[int], data: st.DataObject
) -> None:
    row_edges, col_edges = (sorted({0, 9, *cuts}) for cuts in (rows, cols))
    grid = [Region(*r, *c) for r in pairwise(row_edges) for c in pairwise(col_edges)]
    assert cover_matrix(data.draw(st.permutations(grid)), (9, 9))
    assert not cover_matrix(grid[1:], (9, 9)) and not cover_matrix([*grid, grid[-1]], (9, 9))
