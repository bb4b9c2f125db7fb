"""Who computes which matrix: deterministic longest-processing-time packing over the ranks of a stage, equal everywhere."""

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_opt.distributed.exchange import Part
from megatron_opt.optimizers.base import Cost


@dataclass(frozen=True)
class Job:
    """A matrix to place: its shape as (rows, columns), cost, and the side that may be cut (None: whole only)."""

    matrix: str
    shape: tuple[int, int]
    cost: Cost
    split_dim: int | None = None

    @property
    def load(self) -> float:
        """What packing balances: FLOPs per step, with memory traffic counted at 10 FLOPs a byte."""
        return self.cost.mean_flops() + 10.0 * self.cost.elementwise_bytes + 1.0


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


def _slices(length: int, count: int) -> list[tuple[int, int]]:
    """Cut [0, length) into `count` nearly equal intervals, none empty."""
    count = min(count, length)
    edges = [length * i // count for i in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def pack(jobs: Sequence[Job], ranks: int, mode: str = "auto") -> Plan:
    """Place every matrix: whole on one rank, or in slices on several where the rule allows it and one rank would be late.

    `mode` "owner" and "sharded" force one way where the rule allows it; "auto" cuts a matrix only when its load exceeds
    the mean load of a rank.
    """
    order = sorted(jobs, key=lambda job: (-job.load, job.matrix))
    mean = sum(job.load for job in order) / ranks
    heap = [(0.0, 0.0, rank) for rank in range(ranks)]  # load, state bytes, rank
    heapq.heapify(heap)
    parts: list[Part] = []
    owner: dict[str, int] = {}
    flops, state = [0.0] * ranks, [0.0] * ranks
    for job in order:
        count = 1
        if job.split_dim is not None and ranks > 1:
            if mode == "sharded":
                count = ranks
            elif mode == "auto" and job.load > mean:
                count = min(ranks, -(-int(job.load) // max(int(mean), 1)))
        dim = job.split_dim or 0
        cuts = _slices(job.shape[dim], count) if count > 1 else [(0, job.shape[dim])]
        taken = [heapq.heappop(heap) for _ in cuts]
        owner[job.matrix] = taken[0][2]
        for index, ((start, stop), (load, held, rank)) in enumerate(zip(cuts, taken, strict=True)):
            share = (stop - start) / job.shape[dim]
            parts.append(Part(job.matrix, index, rank, dim, start, stop, job.shape))
            flops[rank] += job.cost.mean_flops() * share
            state[rank] += job.cost.state_bytes * share
            heapq.heappush(heap, (load + job.load * share, held + job.cost.state_bytes * share, rank))
    loads = [0.0] * ranks
    for load, _, rank in heap:
        loads[rank] = load
    return Plan(parts, owner, loads, flops, state)


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
