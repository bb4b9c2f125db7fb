"""Routes against brute force, with integers and no process group: every part gets what it needs, every shard gets it back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.distributed.compute_shards import ComputeShard
from megatron_opt.distributed.exchange import Holdings, Route, find_routes
from megatron_opt.distributed.param_shards import Rect
from megatron_opt.layout.region import Region


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Holdings], list[ComputeShard], dict[str, tuple[int, int]]]:
    """Matrices cut into rectangles that random ranks hold (some twice), and cut into parts that random ranks compute."""
    ranks = draw(st.integers(1, 5))
    holdings: list[Holdings] = [[] for _ in range(ranks)]
    parts: list[ComputeShard] = []
    shapes = {}
    for number in range(draw(st.integers(1, 4))):
        name = f"m{number}"
        rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        shapes[name] = rows, cols
        row_cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=3))})
        col_cuts = sorted({0, cols, *draw(st.lists(st.integers(0, cols), max_size=3))})
        for r0, r1 in zip(row_cuts[:-1], row_cuts[1:], strict=True):
            for c0, c1 in zip(col_cuts[:-1], col_cuts[1:], strict=True):
                for holder in draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=2)):
                    index = len(holdings[holder])
                    holdings[holder].append((index, Rect(name, Region(r0, r1, c0, c1))))
        middle, index = draw(st.integers(0, rows)), 0
        for top, bottom in ((0, middle), (middle, rows)):  # two submatrices, each cut along a side of its own
            if top == bottom:
                continue
            submatrix = None if bottom - top == rows else Region(top, bottom, 0, cols)
            dim = draw(st.integers(0, 1))
            first, last = ((top, bottom), (0, cols))[dim]
            edges = sorted({first, last, *draw(st.lists(st.integers(first, last), max_size=3))})
            for start, stop in zip(edges[:-1], edges[1:], strict=True):
                parts.append(
                    ComputeShard(
                        name, index, draw(st.integers(0, ranks - 1)), dim, start, stop, (rows, cols), submatrix
                    )
                )
                index += 1
    return holdings, parts, shapes


def block_of(whole: torch.Tensor, rect: Rect) -> torch.Tensor:
    return rect.region.of(whole)


@settings(deadline=None)
@given(situations(), st.integers(1, 3))
def test_parts_get_all_and_every_holder_gets_it_back(
    situation: tuple[list[Holdings], list[ComputeShard], dict[str, tuple[int, int]]], bucket_count: int
) -> None:
    holdings, parts, shapes = situation
    ranks = len(holdings)
    names = sorted(shapes)
    buckets = [names[i::bucket_count] for i in range(bucket_count) if names[i::bucket_count]]
    routes = [find_routes(holdings, parts, rank, buckets) for rank in range(ranks)]
    whole = {name: torch.arange(r * c).view(r, c) + 1000 * i for i, (name, (r, c)) in enumerate(sorted(shapes.items()))}
    flats = [[block_of(whole[rect.matrix], rect).clone().reshape(-1) for _, rect in held] for held in holdings]
    buffers = {part.key: torch.full(part.buffer_shape, -1) for part in parts}
    of_part = {part.key: part for part in parts}
    for bucket in range(len(buckets)):
        here: list[Route] = [routes[rank][bucket] for rank in range(ranks)]
        for source in range(ranks):
            for target in range(ranks):
                sent, taken = here[source].gather_out[target], here[target].gather_in[source]
                assert [item.numel for item in sent] == [item.numel for item in taken]
                for out, arrived in zip(sent, taken, strict=True):
                    arrived.of_buffer(buffers[arrived.part]).copy_(out.of_param_shard(flats[source][out.param_shard]))
    for key, buffer in buffers.items():
        r0, r1, c0, c1 = of_part[key].bounds
        assert torch.equal(buffer, whole[key[0]][r0:r1, c0:c1])
        buffer.neg_()
    for bucket in range(len(buckets)):
        for source in range(ranks):
            for target in range(ranks):
                sent = routes[source][bucket].scatter_out[target]
                taken = routes[target][bucket].scatter_in[source]
                assert [item.numel for item in sent] == [item.numel for item in taken]
                for out, arrived in zip(sent, taken, strict=True):
                    arrived.of_param_shard(flats[target][arrived.param_shard]).copy_(out.of_buffer(buffers[out.part]))
    for held, mine in zip(holdings, flats, strict=True):
        for (_, rect), flat in zip(held, mine, strict=True):
            assert torch.equal(flat, -block_of(whole[rect.matrix], rect).reshape(-1))
