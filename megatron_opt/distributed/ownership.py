"""Who computes which matrix: deterministic packing over the ranks of a stage, equal everywhere.

Whole matrices go by longest processing time first. Where that leaves a rank late, matrices whose rule can work on slices
are poured into the ranks one after another, each rank filled to the mean load (McNaughton 1959), so that a matrix is cut
only where a rank is full.
"""

import hashlib
import heapq
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from megatron_opt.distributed.exchange import Part
from megatron_opt.optimizers.base import Cost, MatrixInfo

MODES = ("auto", "owner", "group", "sharded")
BALANCED = 1.1  # most loaded rank over the mean, up to which `auto` cuts nothing
_WORTH = 1e9  # FLOPs by which the most loaded rank is late, from which a cut pays for its exchanges
_SNAP = 0.01  # share of a rank's mean load that is not worth a slice of its own


def load_of(cost: Cost) -> float:
    """What packing balances: FLOPs per step, with memory traffic counted at 10 FLOPs a byte."""
    return cost.mean_flops() + 10.0 * cost.elementwise_bytes + 1.0


@dataclass(frozen=True)
class Job:
    """A matrix to place: its shape as (rows, columns), cost, the side that may be cut (None: whole only), and how."""

    matrix: str
    shape: tuple[int, int]
    cost: Cost
    split_dim: int | None = None
    slice_costs: Callable[[tuple[int, ...]], list[Cost]] | None = None
    grain: int = 1  # slices start at multiples of it

    @staticmethod
    def of(info: MatrixInfo, rule: Any, cost: Cost | None = None) -> "Job":
        """The job of a matrix under its rule."""
        shape = (info.shape[0], info.shape[1]) if len(info.shape) == 2 else (info.shape[0], 1)
        dim = rule.split_dim(info)
        grain = 1 if dim is None else rule.slice_grain(info)
        return Job(info.name, shape, cost or rule.cost(info), dim, lambda edges: rule.slice_costs(info, edges), grain)

    @property
    def load(self) -> float:
        """Of the whole matrix."""
        return load_of(self.cost)


@dataclass
class Plan:
    """Parts of all matrices, and per rank the load and bytes of state."""

    parts: list[Part]
    owner: dict[str, int]
    load: list[float]
    flops: list[float]
    state_bytes: list[float]

    def imbalance(self) -> float:
        """Largest load over mean load."""
        mean = sum(self.load) / len(self.load)
        return max(self.load) / mean if mean else 1.0

    def digest(self) -> str:
        """Equal on two ranks if and only if their plans are."""
        parts = [(p.matrix, p.index, p.rank, p.dim, p.start, p.stop) for p in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


Pieces = list[tuple[int, int, int]]  # rank, start, stop of the cut side


def _whole(jobs: Sequence[Job], ranks: int) -> tuple[dict[str, Pieces], list[float]]:
    """Every matrix on one rank, the largest first to the least loaded; loads by rank."""
    heap = [(0.0, 0.0, rank) for rank in range(ranks)]  # load, state bytes, rank
    found: dict[str, Pieces] = {}
    for job in jobs:
        load, held, rank = heapq.heappop(heap)
        found[job.matrix] = [(rank, 0, job.shape[job.split_dim or 0])]
        heapq.heappush(heap, (load + job.load, held + job.cost.state_bytes, rank))
    loads = [0.0] * ranks
    for load, _, rank in heap:
        loads[rank] = load
    return found, loads


def _even(job: Job, ranks: int) -> Pieces:
    """Nearly equal slices on all ranks, none empty."""
    assert job.split_dim is not None
    length = job.shape[job.split_dim]
    grains = -(-length // job.grain)
    count = min(ranks, grains)
    edges = [min(length, grains * rank // count * job.grain) for rank in range(count + 1)]
    return [(rank, *edge) for rank, edge in enumerate(pairwise(edges))]


def _level(loads: Sequence[float], more: float) -> float:
    """The load to which ranks must be filled to take `more` among them; fuller ranks stay as they are."""
    ordered = sorted(loads)
    for count, below in zip(range(len(ordered), 0, -1), list(accumulate(ordered))[::-1], strict=True):
        level = (more + below) / count
        if level >= ordered[count - 1]:
            return level
    return ordered[0]


def _pour(jobs: Sequence[Job], loads: Sequence[float]) -> dict[str, Pieces]:
    """Jobs one after another into the ranks' room below a common level, cut where a rank is full."""
    level = _level(loads, sum(job.load for job in jobs))
    borders = [0.0, *accumulate(max(0.0, level - load) for load in loads)]
    found: dict[str, Pieces] = {}
    at, rank = 0.0, 0
    for job in jobs:
        length, end = job.shape[job.split_dim or 0], at + job.load
        grain = job.grain if job.grain > 1 else 1 << max(0, length.bit_length() - 9)  # slices of whole tiles
        while rank + 1 < len(loads) and borders[rank + 1] <= at + min(_SNAP * level, job.load / 2):
            rank += 1
        pieces, start = [], 0
        while start < length:
            stop = length
            if rank + 1 < len(loads) and borders[rank + 1] < end - min(_SNAP * level, job.load / 2):
                share = (borders[rank + 1] - at) / job.load
                stop = min(length, max(start, round(length * share / grain) * grain))
            if stop > start:
                pieces.append((rank, start, stop))
            start = stop
            if start < length:
                rank += 1
        found[job.matrix], at = pieces, end
    return found


def pack(jobs: Sequence[Job], ranks: int, mode: str = "auto") -> Plan:
    """Place every matrix: whole on one rank, or in slices on several where its rule allows it.

    `owner` cuts nothing, `sharded` cuts over all ranks, `group` fills every rank to the mean; `auto` is `owner`, or
    `group` where a rank would be late by more than a tenth of the mean load.
    """
    order = sorted(jobs, key=lambda job: (-job.load, job.matrix))
    placed, loads = _whole(order, ranks)
    mean = sum(loads) / ranks
    late = max(loads, default=0.0) - mean
    cut = [job for job in order if job.split_dim is not None]
    if mode == "sharded":
        placed |= {job.matrix: _even(job, ranks) for job in cut}
    elif mode == "group" or (mode == "auto" and late > (BALANCED - 1) * mean and late > _WORTH):
        placed, loads = _whole([job for job in order if job.split_dim is None], ranks)
        placed |= _pour(cut, loads)
    parts: list[Part] = []
    load, flops, state = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    for job in order:
        pieces = placed[job.matrix]
        costs = [job.cost]
        if len(pieces) > 1:
            assert job.slice_costs is not None
            costs = job.slice_costs((0, *[stop for _, _, stop in pieces]))
        for index, ((rank, start, stop), cost) in enumerate(zip(pieces, costs, strict=True)):
            parts.append(Part(job.matrix, index, rank, job.split_dim or 0, start, stop, job.shape))
            load[rank] += load_of(cost)
            flops[rank] += cost.mean_flops()
            state[rank] += cost.state_bytes
    return Plan(parts, {job.matrix: placed[job.matrix][0][0] for job in order}, load, flops, state)


def make_buckets(
    parts: Sequence[Part], ranks: int, bucket_bytes: float, element_bytes: int = 4
) -> list[list[str]]:
    """Matrices in travelling order: buckets in which no rank receives more than `bucket_bytes`, every rank has a share."""
    by_rank: dict[int, list[Part]] = {}
    for part in parts:
        by_rank.setdefault(part.rank, []).append(part)
    depth: dict[str, int] = {}
    for rank in sorted(by_rank):
        filled, level = 0.0, 0
        for part in by_rank[rank]:
            rows, cols = part.slab_shape
            size = rows * cols * element_bytes
            if filled and filled + size > bucket_bytes:
                filled, level = 0.0, level + 1
            filled += size
            depth[part.matrix] = max(depth.get(part.matrix, 0), level)
    buckets: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in sorted(depth):
        buckets[depth[name]].append(name)
    return [bucket for bucket in buckets if bucket]


def plan_table(plan: Plan, sent: Mapping[int, float] | None = None, title: str = "optimizer plan") -> str:
    """Per rank: matrices, FLOPs, state bytes, bytes sent a step; the most loaded against the mean; the total."""
    ranks = len(plan.load)
    lines = [f"{title}: {len(plan.owner)} matrices on {ranks} ranks, digest {plan.digest()}"]
    lines.append(f"{'rank':>6} {'parts':>6} {'GFLOP/step':>12} {'state MiB':>10} {'sent MiB':>10} {'load/mean':>9}")
    mean = sum(plan.load) / ranks or 1.0
    count = [0] * ranks
    for part in plan.parts:
        count[part.rank] += 1
    shown = list(range(ranks)) if ranks <= 16 else [*range(8), *range(ranks - 8, ranks)]
    for rank in shown:
        out = f"{(sent or {}).get(rank, 0.0) / 2**20:10.2f}" if sent is not None else f"{'-':>10}"
        lines.append(
            f"{rank:>6} {count[rank]:>6} {plan.flops[rank] / 1e9:>12.3f} {plan.state_bytes[rank] / 2**20:>10.2f} "
            f"{out} {plan.load[rank] / mean:>9.3f}"
        )
    lines.append(
        f" total {sum(count):>6} {sum(plan.flops) / 1e9:>12.3f} {sum(plan.state_bytes) / 2**20:>10.2f} "
        f"{sum(sent.values()) / 2**20 if sent else 0:>10.2f} {plan.imbalance():>9.3f} (most loaded / mean)"
    )
    return "\n".join(lines)
