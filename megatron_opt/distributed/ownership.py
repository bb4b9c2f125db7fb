"""Who computes which matrix: deterministic packing over the ranks of a stage, equal everywhere.

Whole matrices go by longest processing time first. Where that leaves a rank late, or with far more state than the mean,
matrices whose rule allows it are cut: see `pouring`.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_opt.distributed.jobs import Job, Run, even, load_of
from megatron_opt.distributed.parts import Part
from megatron_opt.distributed.pouring import pour

MODES = ("auto", "owner", "group", "sharded")
BALANCED = 1.1  # most loaded rank over the mean, and most state over the mean, up to which `auto` cuts nothing
_LATE = 1.15  # load over the mean that is not exceeded for more even state
_WORTH = 1e9  # FLOPs by which the most loaded rank is late, from which a cut pays for its exchanges
_WORTH_BYTES = 2.0**20  # the same of state


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
        return _over_mean(self.load)

    def state_imbalance(self) -> float:
        """Most bytes of state over their mean."""
        return _over_mean(self.state_bytes)

    def is_balanced(self) -> bool:
        """Whether no rank has more of either than is worth a cut."""
        return all(
            _over_mean(values) <= BALANCED or max(values) - sum(values) / len(values) <= worth
            for values, worth in ((self.load, _WORTH), (self.state_bytes, _WORTH_BYTES))
        )

    def digest(self) -> str:
        """Equal on two ranks if and only if their plans are."""
        parts = [(p.matrix, p.index, p.rank, p.area, p.bounds) for p in self.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean else 1.0


def _whole(jobs: Sequence[Job], ranks: int, both: bool = False) -> dict[str, list[Run]]:
    """Every matrix on one rank, the largest first to the rank with the least load, or least of load and state together."""
    load = sum(job.load for job in jobs) or 1.0
    state = (sum(job.cost.state_bytes for job in jobs) or 1.0) if both else float("inf")
    sizes = {job.matrix: (job.load / load + job.cost.state_bytes / state) for job in jobs}
    heap = [(0.0, 0.0, rank) for rank in range(ranks)]  # size, bytes of state, rank
    found: dict[str, list[Run]] = {}
    for job in sorted(jobs, key=lambda job: (-sizes[job.matrix], job.matrix)):
        size, held, rank = heapq.heappop(heap)
        found[job.matrix] = [(rank, 0, job.places)]
        heapq.heappush(heap, (size + sizes[job.matrix], held + job.cost.state_bytes, rank))
    return found


def _poured(jobs: Sequence[Job], ranks: int, both: bool) -> dict[str, list[Run]]:
    """What may be cut, poured around whole matrices."""
    placed = _whole([job for job in jobs if job.places == 1], ranks)
    loads, states = [0.0] * ranks, [0.0] * ranks
    for job in jobs:
        for rank, _, _ in placed.get(job.matrix, []):
            loads[rank] += job.load
            states[rank] += job.cost.state_bytes
    return placed | pour([job for job in jobs if job.places > 1], loads, states, both)


def _plan(jobs: Sequence[Job], ranks: int, placed: dict[str, list[Run]]) -> Plan:
    parts: list[Part] = []
    load, flops, state = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    owner = {}
    for job in jobs:
        made = job.parts(placed[job.matrix])
        owner[job.matrix] = made[0][0].rank
        for part, cost in made:
            parts.append(part)
            load[part.rank] += load_of(cost)
            flops[part.rank] += cost.mean_flops()
            state[part.rank] += cost.state_bytes
    return Plan(parts, owner, load, flops, state)


def _ways(jobs: Sequence[Job], ranks: int, mode: str) -> Iterator[dict[str, list[Run]]]:
    """Placements that a mode may choose, in the order of what they cut."""
    if mode == "sharded":
        yield {job.matrix: even(job, ranks) for job in jobs if job.places > 1} | _whole(
            [job for job in jobs if job.places == 1], ranks
        )
        return
    if mode != "group":
        yield _whole(jobs, ranks)
    if mode == "auto":
        yield _whole(jobs, ranks, both=True)
    if mode != "owner":
        yield _poured(jobs, ranks, both=False)
        yield _poured(jobs, ranks, both=True)


def pack(jobs: Sequence[Job], ranks: int, mode: str = "auto") -> Plan:
    """Place every matrix: whole on one rank, or in cells and slices on several where its rule allows it.

    `owner` cuts nothing, `sharded` cuts over all ranks, `group` fills every rank to the mean; `auto` is `owner`, or
    `group` where a rank would be late or have more state by more than a tenth of the mean. Where neither gets there,
    load comes first.
    """
    order = sorted(jobs, key=lambda job: (-job.load, job.matrix))
    plans: list[Plan] = []
    for placed in _ways(order, ranks, mode):
        plans.append(_plan(order, ranks, placed))
        if plans[-1].is_balanced():
            return plans[-1]
    return min(plans, key=lambda plan: (max(plan.imbalance(), _LATE), plan.state_imbalance()))


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
