"""Subgroups: a few ranks that share a few equal matrices and nothing else, so that little is cut.

With ranks and matrices as nodes and parts as edges, what is connected and has g ranks is cut at least g − 1 times: `wraparound`
makes one line of all ranks, many small subgroups are cut less. Subgroups hold equal matrices, so that what balances the load
balances the state too. Where one kind of matrix has so much load and another so much state that this takes more ranks than
there are, as few subgroups as it takes are packed together.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_opt.distributed.jobs import Job, Run
from megatron_opt.distributed.wraparound import pack_wraparound

_MATRICES = 16  # that a subgroup shares at most
_SMALL = 0.25  # of a rank's share: matrices below it are placed last, whole, where there is room
_FINE = 512  # shards are multiples of about this part of a rank's load; one subgroup is packed for all like it


@dataclass(frozen=True)
class _Split:
    """Subgroups of `matrices` matrices: ranks and cuts of all together."""

    matrices: int
    ranks: int
    cuts: int


@dataclass(frozen=True)
class _Kind:
    """Equal jobs; `load` and `state` of one over a rank's share of all."""

    jobs: list[Job]
    load: float
    state: float

    @property
    def size(self) -> float:
        """Ranks that one fills."""
        return max(self.load, self.state)

    def subgroup(self, matrices: int, most: float) -> int:
        """Ranks for some of them, filled up to `most` times the mean; one for each that cannot be cut."""
        if self.jobs[0].units == 1:
            return -(-matrices // max(1, int(most / self.size)))
        return max(1, math.ceil(matrices * self.size / most - 1e-9))

    def splits(self, most: float) -> list[_Split]:
        """Ways to make subgroups, of ever more cuts and ever fewer ranks."""
        made, count = [], len(self.jobs)
        for matrices in range(1, min(count, _MATRICES) + 1):
            full, rest = divmod(count, matrices)
            subgroups = [self.subgroup(matrices, most)] * full + [self.subgroup(rest, most)] * (rest > 0)
            made.append(_Split(matrices, sum(subgroups), sum(subgroups) - len(subgroups)))
        ordered: list[_Split] = []
        for split in sorted(made, key=lambda split: (split.cuts, -split.ranks, split.matrices)):
            if not ordered or (split.ranks < ordered[-1].ranks and self.jobs[0].units > 1):
                ordered.append(split)
        return ordered


@dataclass(frozen=True)
class _Subgroup:
    """Matrices of a kind and the number of ranks that share them."""

    kind: _Kind
    jobs: list[Job]
    ranks: int


def pack_subgroups(jobs: Sequence[Job], ranks: int, most: float) -> dict[str, list[Run]]:
    """Runs by job, ranks filled up to about `most` times the mean load and state."""
    load = sum(job.load for job in jobs) / ranks
    state = sum(job.cost.state_bytes for job in jobs) / ranks or 1.0
    kinds = []
    for _, equal in groupby(sorted(jobs, key=lambda job: (_likeness(job), job.matrix)), key=_likeness):
        several = list(equal)
        kinds.append(_Kind(several, several[0].load / load, several[0].cost.state_bytes / state))
    large = [kind for kind in kinds if kind.size >= _SMALL]
    subgroups, rest = _merge(_subgroups(large, ranks, most), ranks, most)
    placed: dict[str, list[Run]] = {}
    loads, states, first = [0.0] * ranks, [0.0] * ranks, 0
    packed: dict[tuple[int, int], dict[str, list[Run]]] = {}  # by kind and size of a subgroup
    for subgroup in subgroups:
        key = id(subgroup.kind), len(subgroup.jobs)
        if key not in packed:
            packed[key] = pack_wraparound(
                subgroup.jobs, [0.0] * subgroup.ranks, [0.0] * subgroup.ranks, both=False, fine=_FINE
            )
        for job, runs in zip(subgroup.jobs, list(packed[key].values()), strict=True):
            placed[job.matrix] = [(first + rank, low, high) for rank, low, high in runs]
        first += subgroup.ranks
    if rest:
        runs_of = pack_wraparound(
            [job for subgroup in rest for job in subgroup.jobs], [0.0] * (ranks - first), [0.0] * (ranks - first), True
        )
        placed |= {name: [(first + rank, low, high) for rank, low, high in runs] for name, runs in runs_of.items()}
    for kind in large:
        for job in kind.jobs:
            for rank, low, high in placed[job.matrix]:
                loads[rank] += kind.load * (high - low) / job.units
                states[rank] += kind.state * (high - low) / job.units
    for kind in (kind for kind in kinds if kind.size < _SMALL):
        placed |= _place_small(kind, loads, states)
    return placed


def _likeness(job: Job) -> tuple[Any, ...]:
    """Equal for jobs that weigh the same and are cut alike; the largest first."""
    side = -1 if job.shard_dim is None else job.shard_dim
    return -job.load, -job.cost.state_bytes, job.shape, job.tile, side


def _subgroups(kinds: Sequence[_Kind], ranks: int, most: float) -> list[_Subgroup]:
    """All of each kind in subgroups, with as few cuts as the ranks allow; where they do not suffice, on the fewest."""
    ways = [kind.splits(most) for kind in kinds]
    while sum(way[0].ranks for way in ways) > ranks:
        # the kind that frees ranks for the least load of what is cut besides, and of equal ones that with the most room
        prices = [
            ((way[1].cuts - way[0].cuts) * kind.load / (way[0].ranks - way[1].ranks),
             kind.size * len(kind.jobs) / way[0].ranks, number)
            for number, (kind, way) in enumerate(zip(kinds, ways, strict=True)) if len(way) > 1
        ]  # fmt: skip
        if not prices:
            break
        del ways[min(prices)[2]][0]
    return [
        _Subgroup(kind, mine, kind.subgroup(len(mine), most))
        for kind, (split, *_) in zip(kinds, ways, strict=True)
        for mine in (kind.jobs[at : at + split.matrices] for at in range(0, len(kind.jobs), split.matrices))
    ]


def _merge(subgroups: Sequence[_Subgroup], ranks: int, most: float) -> tuple[list[_Subgroup], list[_Subgroup]]:
    """Subgroups that stay, and those that share the ranks that are left: such that these have load and state for them."""
    kept: dict[int, list[_Subgroup]] = {}
    for subgroup in subgroups:
        kept.setdefault(id(subgroup.kind), []).append(subgroup)
    rest: list[_Subgroup] = []
    free, load, state = ranks - sum(subgroup.ranks for subgroup in subgroups), 0.0, 0.0

    def over(subgroup: _Subgroup) -> float:
        """What the rest has too much of with one more."""
        many = len(subgroup.jobs)
        return max(load + many * subgroup.kind.load, state + many * subgroup.kind.state) - most * (
            free + subgroup.ranks
        )

    while max(load, state) > most * free and any(kept.values()):
        subgroup = min((several[-1] for several in kept.values() if several), key=over)
        rest.append(kept[id(subgroup.kind)].pop())
        free += subgroup.ranks
        load += len(subgroup.jobs) * subgroup.kind.load
        state += len(subgroup.jobs) * subgroup.kind.state
    return [subgroup for several in kept.values() for subgroup in several], rest


def _place_small(kind: _Kind, loads: list[float], states: list[float]) -> dict[str, list[Run]]:
    """Whole jobs, each to the rank that is then the least full; adds them to what ranks have."""
    heap = [(max(load + kind.load, state + kind.state), rank) for rank, (load, state) in enumerate(zip(loads, states))]
    heapq.heapify(heap)
    runs: dict[str, list[Run]] = {}
    for job in kind.jobs:
        rank = heap[0][1]
        runs[job.matrix] = [(rank, 0, job.units)]
        loads[rank] += kind.load
        states[rank] += kind.state
        heapq.heapreplace(heap, (max(loads[rank] + kind.load, states[rank] + kind.state), rank))
    return runs
