"""Who computes which matrix: deterministic packing over the ranks of a stage, equal everywhere.

Whole matrices go by longest processing time first. Where that leaves a rank late, or with far more state than the mean,
matrices whose rule allows it are cut: see `wraparound` and `subgroups`. Of what balances, what sends least is taken.
"""

import hashlib
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_opt.distributed.compute_shards import ComputeShard, submatrices_of
from megatron_opt.distributed.jobs import Job, Run, even, load_of
from megatron_opt.distributed.subgroups import pack_subgroups
from megatron_opt.distributed.wraparound import pack_wraparound
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import Cost

BALANCED = (
    EngineOptions.matrix_balance
)  # most loaded rank over the mean, and most state over the mean, that `auto` is content with
_LATE = 1.15  # load over the mean that is not exceeded for more even state
_WORTH = 1e9  # FLOPs by which the most loaded rank is late, from which a cut pays for its exchanges
_WORTH_BYTES = 2.0**20  # the same of state
_SENT = 5e3  # FLOPs (a GPU's, bf16) in half the time that a byte takes to another node
_FACTORIZED = 1e3  # times that a FLOP of a factorization (QR, eigh, solve) takes longer than a product's
_MEMORY = 0.3  # share of time that twice the state on the fullest rank is worth
_ROOM = (1.0, 0.8, 0.6, 0.4, 0.2)  # shares of what `auto` allows above the mean, to which subgroups are filled


@dataclass
class Plan:
    """Parts of all matrices, and per rank the load and bytes of state."""

    parts: list[ComputeShard]
    owner: dict[str, int]
    load: list[float]
    flops: list[float]
    state_bytes: list[float]
    exchanged: list[float]  # bytes sent in a step to other shards of the same matrices
    instances: int = 1  # equal groups of ranks of which each follows this plan by itself
    offloaded: float = 0.0  # share of the state that rests in host memory

    def imbalance(self) -> float:
        """Largest load over mean load."""
        return _over_mean(self.load)

    def state_imbalance(self) -> float:
        """Most bytes of state over their mean."""
        return _over_mean(self.state_bytes)

    def price(self) -> float:
        """Load of the rank that is ready last, its bytes to other shards and as many as a rank sends on average counted.

        Uneven state makes a plan dearer.
        """
        last = max(load + _SENT * sent for load, sent in zip(self.load, self.exchanged, strict=True))
        return (last + _SENT * sum(self.exchanged) / len(self.load)) * (1 + _MEMORY * (self.state_imbalance() - 1))

    def is_balanced(self, most: float = BALANCED) -> bool:
        """Whether no rank has more of either than `most` times the mean, or too little more to be worth a cut."""
        return all(
            _over_mean(values) <= most or max(values) - sum(values) / len(values) <= worth
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
    runs: dict[str, list[Run]] = {}
    for job in sorted(jobs, key=lambda job: (-sizes[job.matrix], job.matrix)):
        size, state_bytes, rank = heapq.heappop(heap)
        runs[job.matrix] = [(rank, 0, job.units)]
        heapq.heappush(heap, (size + sizes[job.matrix], state_bytes + job.cost.state_bytes, rank))
    return runs


def _wrapped(jobs: Sequence[Job], ranks: int, both: bool) -> dict[str, list[Run]]:
    """What may be cut, packed around whole matrices."""
    placed = _whole([job for job in jobs if job.units == 1], ranks)
    loads, states = [0.0] * ranks, [0.0] * ranks
    for job in jobs:
        for rank, _, _ in placed.get(job.matrix, []):
            loads[rank] += job.load
            states[rank] += job.cost.state_bytes
    return placed | pack_wraparound([job for job in jobs if job.units > 1], loads, states, both)


def _plan(jobs: Sequence[Job], ranks: int, placed: dict[str, list[Run]]) -> Plan:
    parts: list[ComputeShard] = []
    load, flops, state, sent = ([0.0] * ranks for _ in range(4))
    owner = {}
    for job in jobs:
        made = job.parts(placed[job.matrix])
        for submatrix in submatrices_of(part for part, _ in made) if len(made) > 1 else ():
            if len(submatrix.parts) > 1:
                for collective in job.collectives(submatrix.area.shape, submatrix.edges):
                    for index, part in enumerate(submatrix.parts):
                        sent[part.rank] += collective.sent_bytes(index)
        owner[job.matrix] = made[0][0].rank
        for part, cost in made:
            parts.append(part)
            load[part.rank] += load_of(cost)
            flops[part.rank] += cost.mean_flops()
            state[part.rank] += cost.state_bytes
    return Plan(parts, owner, load, flops, state, sent)


def pack_instances(jobs: Sequence[Job], ranks: int, instances: int, options: EngineOptions) -> Plan:
    """Place every matrix where `instances` equal groups of ranks (HSDP) each hold all of them: among all ranks, or in each.

    Owners across instances compute a matrix once and send its direction to every instance; owners within compute and keep
    it once an instance, and send nothing to others. `auto` takes the cheaper, what travels between instances priced as
    between nodes, factorizations at their own rate.
    """

    def packed(groups: int) -> Plan:
        plan = pack(jobs, ranks // groups, options.matrix_mode, options.matrix_balance)
        return replace(plan, instances=groups, offloaded=options.offloaded)

    if instances == 1 or options.matrix_instances != "auto":
        return packed(instances if options.matrix_instances == "within" else 1)
    across, within, sent = packed(1), packed(instances), [0.0] * ranks
    for part in across.parts:
        rows, cols = part.buffer_shape
        sent[part.rank] += rows * cols * options.communication_dtype.itemsize * (instances - 1)
    slow = _FACTORIZED * sum(_factorized(job.cost) for job in jobs) / ranks
    apart = (within.price() + slow * instances) * (1 + _MEMORY * (instances - 1))
    is_cheaper = across.price() + slow + 2 * _SENT * max(sent) <= apart
    return across if is_cheaper else within


def _factorized(cost: Cost) -> float:
    """Mean FLOPs of a step in factorizations."""
    return sum(
        cost.flops.get(kind, 0.0) + cost.refresh.get(kind, 0.0) / cost.refresh_every for kind in ("qr", "eigh", "solve")
    )


def check_balance(most: float) -> None:
    """Refuse what no plan can keep to."""
    if not 1.0 <= most < math.inf:
        raise UserError(f"--matrix-balance {most} is no ratio of the most to the mean; give 1 or more, 1.1 say.")


def pack(jobs: Sequence[Job], ranks: int, mode: str = "auto", most: float = BALANCED) -> Plan:
    """Place every matrix: whole on one rank, or in submatrices and shards on several where its rule allows it.

    `owner` cuts nothing, `sharded` cuts over all ranks, `group` fills every rank to the mean. `auto` is `owner` where
    no rank then has more load or state than `most` times the mean; else, among ways to cut that keep to this, what is
    the cheapest in load and bytes sent. Where none does, load comes first. Raises UserError for `most` below 1.
    """
    check_balance(most)
    order = sorted(jobs, key=lambda job: (-job.load, job.matrix))
    plans: list[Plan] = []

    def add(placed: dict[str, list[Run]]) -> bool:
        plans.append(_plan(order, ranks, placed))
        return plans[-1].is_balanced(most)

    if mode == "sharded":
        whole = _whole([job for job in order if job.units == 1], ranks)
        return _plan(order, ranks, {job.matrix: even(job, ranks) for job in order if job.units > 1} | whole)
    if mode == "owner":
        return _plan(order, ranks, _whole(order, ranks))
    if mode == "auto" and (add(_whole(order, ranks)) or add(_whole(order, ranks, both=True))):
        return plans[-1]
    if add(_wrapped(order, ranks, both=False)) and mode == "group":
        return plans[-1]
    add(_wrapped(order, ranks, both=True))
    if mode == "auto" and jobs:
        for share in _ROOM:
            add(pack_subgroups(order, ranks, 1.0 + share * (most - 1.0)))
    if balanced := [plan for plan in plans if plan.is_balanced(most)]:
        return min(balanced, key=Plan.price)
    return min(plans, key=lambda plan: (max(plan.imbalance(), _LATE), plan.state_imbalance()))


def make_buckets(
    parts: Sequence[ComputeShard], ranks: int, bucket_bytes: float, element_bytes: float = 4
) -> list[list[str]]:
    """Matrices in travelling order: buckets in which no rank receives more than `bucket_bytes`, every rank has a share."""
    by_rank: dict[int, list[ComputeShard]] = {}
    for part in parts:
        by_rank.setdefault(part.rank, []).append(part)
    depth: dict[str, int] = {}
    for rank in sorted(by_rank):
        filled, level = 0.0, 0
        for part in by_rank[rank]:
            rows, cols = part.buffer_shape
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
    each = f" of each of {plan.instances} instances" if plan.instances > 1 else ""
    lines = [f"{title}: {len(plan.owner)} matrices on {ranks} ranks{each}, digest {plan.digest()}"]
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
    lines.append(
        f"most state / mean {plan.state_imbalance():.3f}; most sent between shards of a matrix "
        f"{max(plan.exchanged) / 2**20:.2f} MiB, {len(plan.parts) - len(plan.owner)} cuts"
    )
    if plan.offloaded:
        on_host = max(plan.state_bytes) * plan.offloaded / 2**20
        lines.append(f"of the fullest rank's state {on_host:.2f} MiB in host memory, which come and go in a step")
    return "\n".join(lines)
