"""Gangs: a few ranks that share a few equal matrices and nothing else, so that little is cut.

With ranks and matrices as nodes and parts as edges, what is connected and has g ranks is cut at least g − 1 times: `pouring`
makes one line of all ranks, many small gangs are cut less. Gangs hold equal matrices, so that what balances the load
balances the state too. Where one kind of matrix has so much load and another so much state that this takes more ranks than
there are, as few gangs as it takes are poured together.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_opt.distributed.jobs import Job, Run
from megatron_opt.distributed.pouring import pour

_MATRICES = 16  # that a gang shares at most
_SMALL = 0.25  # of a rank's share: matrices below it are placed last, whole, where there is room
_FINE = 512  # slices are multiples of about this part of a rank's load; one gang is poured for all like it


@dataclass(frozen=True)
class _Split:
    """Gangs of `matrices` matrices: ranks and cuts of all together."""

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

    def gang(self, matrices: int, most: float) -> int:
        """Ranks for some of them, filled up to `most` times the mean; one for each that cannot be cut."""
        if self.jobs[0].places == 1:
            return -(-matrices // max(1, int(most / self.size)))
        return max(1, math.ceil(matrices * self.size / most - 1e-9))

    def splits(self, most: float) -> list[_Split]:
        """Ways to make gangs, of ever more cuts and ever fewer ranks."""
        found, count = [], len(self.jobs)
        for matrices in range(1, min(count, _MATRICES) + 1):
            full, rest = divmod(count, matrices)
            gangs = [self.gang(matrices, most)] * full + [self.gang(rest, most)] * (rest > 0)
            found.append(_Split(matrices, sum(gangs), sum(gangs) - len(gangs)))
        ordered: list[_Split] = []
        for split in sorted(found, key=lambda split: (split.cuts, -split.ranks, split.matrices)):
            if not ordered or (split.ranks < ordered[-1].ranks and self.jobs[0].places > 1):
                ordered.append(split)
        return ordered


@dataclass(frozen=True)
class _Gang:
    """Matrices of a kind and the number of ranks that share them."""

    kind: _Kind
    jobs: list[Job]
    ranks: int


def gather(jobs: Sequence[Job], ranks: int, most: float) -> dict[str, list[Run]]:
    """Runs by job, ranks filled up to about `most` times the mean load and state."""
    load = sum(job.load for job in jobs) / ranks
    state = sum(job.cost.state_bytes for job in jobs) / ranks or 1.0
    kinds = []
    for _, equal in groupby(sorted(jobs, key=lambda job: (_likeness(job), job.matrix)), key=_likeness):
        several = list(equal)
        kinds.append(_Kind(several, several[0].load / load, several[0].cost.state_bytes / state))
    large = [kind for kind in kinds if kind.size >= _SMALL]
    gangs, rest = _fit(_gangs(large, ranks, most), ranks, most)
    placed: dict[str, list[Run]] = {}
    loads, states, first = [0.0] * ranks, [0.0] * ranks, 0
    poured: dict[tuple[int, int], dict[str, list[Run]]] = {}  # by kind and size of a gang
    for gang in gangs:
        key = id(gang.kind), len(gang.jobs)
        if key not in poured:
            poured[key] = pour(gang.jobs, [0.0] * gang.ranks, [0.0] * gang.ranks, both=False, fine=_FINE)
        for job, runs in zip(gang.jobs, list(poured[key].values()), strict=True):
            placed[job.matrix] = [(first + rank, low, high) for rank, low, high in runs]
        first += gang.ranks
    if rest:
        runs_of = pour(
            [job for gang in rest for job in gang.jobs], [0.0] * (ranks - first), [0.0] * (ranks - first), True
        )
        placed |= {name: [(first + rank, low, high) for rank, low, high in runs] for name, runs in runs_of.items()}
    for kind in large:
        for job in kind.jobs:
            for rank, low, high in placed[job.matrix]:
                loads[rank] += kind.load * (high - low) / job.places
                states[rank] += kind.state * (high - low) / job.places
    for kind in (kind for kind in kinds if kind.size < _SMALL):
        placed |= _seat(kind, loads, states)
    return placed


def _likeness(job: Job) -> tuple[Any, ...]:
    """Equal for jobs that weigh the same and are cut alike; the largest first."""
    side = -1 if job.shard_dim is None else job.shard_dim
    return -job.load, -job.cost.state_bytes, job.shape, job.tile, side


def _gangs(kinds: Sequence[_Kind], ranks: int, most: float) -> list[_Gang]:
    """All of each kind in gangs, with as few cuts as the ranks allow; where they do not suffice, on the fewest."""
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
        _Gang(kind, mine, kind.gang(len(mine), most))
        for kind, (split, *_) in zip(kinds, ways, strict=True)
        for mine in (kind.jobs[at : at + split.matrices] for at in range(0, len(kind.jobs), split.matrices))
    ]


def _fit(gangs: Sequence[_Gang], ranks: int, most: float) -> tuple[list[_Gang], list[_Gang]]:
    """Gangs that stay, and those that share the ranks that are left: such that these have load and state for them."""
    kept: dict[int, list[_Gang]] = {}
    for gang in gangs:
        kept.setdefault(id(gang.kind), []).append(gang)
    rest: list[_Gang] = []
    free, load, state = ranks - sum(gang.ranks for gang in gangs), 0.0, 0.0

    def over(gang: _Gang) -> float:
        """What the rest has too much of with one more."""
        many = len(gang.jobs)
        return max(load + many * gang.kind.load, state + many * gang.kind.state) - most * (free + gang.ranks)

    while max(load, state) > most * free and any(kept.values()):
        gang = min((several[-1] for several in kept.values() if several), key=over)
        rest.append(kept[id(gang.kind)].pop())
        free += gang.ranks
        load += len(gang.jobs) * gang.kind.load
        state += len(gang.jobs) * gang.kind.state
    return [gang for several in kept.values() for gang in several], rest


def _seat(kind: _Kind, loads: list[float], states: list[float]) -> dict[str, list[Run]]:
    """Whole jobs, each to the rank that is then the least full; adds them to what ranks have."""
    heap = [(max(load + kind.load, state + kind.state), rank) for rank, (load, state) in enumerate(zip(loads, states))]
    heapq.heapify(heap)
    found: dict[str, list[Run]] = {}
    for job in kind.jobs:
        rank = heap[0][1]
        found[job.matrix] = [(rank, 0, job.places)]
        loads[rank] += kind.load
        states[rank] += kind.state
        heapq.heapreplace(heap, (max(loads[rank] + kind.load, states[rank] + kind.state), rank))
    return found
