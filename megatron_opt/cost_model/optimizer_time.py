"""Seconds, FLOPs, bytes and state of the optimizer's part of a step, from its plan and a cluster."""

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.plan import ShardGroupPlan, likeness
from megatron_opt.distributed.compute_shards import submatrices_of
from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import Cost, MatrixInfo

# Bytes that the engine moves for each element that a rank holds, beside what the rules' own costs count:
# the norm reads the gradient (4); the direction is copied into the gradient's place (8), and W ← W − lr·u − decay reads
# both and writes one (12), and the model's parameter where that is another; a projection reads the weight, and reads and
# writes it (12); a travelling element is packed and unpacked on each way (2 × 16).
NORM_BYTES, APPLY_BYTES, PROJECT_BYTES, TRAVEL_BYTES = 4.0, 20.0, 12.0, 32.0
AVERAGE_BYTES = 12.0  # a weight is read, its average too, and written


@dataclass
class OptimizerTime:
    """The slowest rank's part of one step. `by_class` and `element_wise` are seconds of an ordinary step;
    `refresh` what a refresh step adds, once in `refresh_every`; `sent` bytes by what they are for.
    """

    by_class: dict[str, float] = field(default_factory=dict)
    element_wise: float = 0.0
    host: float = 0.0
    refresh: float = 0.0
    refresh_every: float = 1.0
    staggered: bool = False
    exchange: float = 0.0
    exchange_hidden: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0  # mean over steps, all ranks of the shard group
    offload: float = 0.0  # of state that rests in host memory, what its coming and going adds
    offload_way: float = 0.0  # seconds of one way; both are taken at once
    host_bytes: float = 0.0  # at rest in host memory, of the fullest rank
    state_bytes: float = 0.0  # on the device, of the fullest rank
    imbalance: float = 1.0
    asynchronous: bool = False  # the host runs ahead of its device, so the slower of the two counts

    @property
    def compute(self) -> float:
        """Seconds of computation in an ordinary step."""
        kernels = sum(self.by_class.values()) + self.element_wise
        return max(kernels, self.host) if self.asynchronous else kernels + self.host

    @property
    def ordinary(self) -> float:
        """An ordinary step: refreshes that are staggered are in every step."""
        base = self.compute + self.exchange - self.exchange_hidden + self.offload
        return base + (self.refresh / self.refresh_every if self.staggered else 0.0)

    @property
    def worst(self) -> float:
        """A step with refreshes."""
        return self.ordinary if self.staggered else self.ordinary + self.refresh

    @property
    def mean(self) -> float:
        """Averaged over steps."""
        return self.ordinary + (0.0 if self.staggered else self.refresh / self.refresh_every)


def dtype_of(optimizer: Any) -> str:
    """The type in which a rule's products run: what its configuration says, else fp32."""
    precision = getattr(optimizer.config, "fp32_matmul_prec", None)
    return "bf16" if precision == "medium" else "fp32"


def size_of(optimizer: Any, info: MatrixInfo) -> float:
    """The side that decides a kernel's speed: the shorter one, or the rule's block."""
    side = min(info.shape) if len(info.shape) == 2 else info.shape[0]
    block = getattr(optimizer.config, "block_size", 0) or side
    return float(min(side, block))


def _seconds(flops: dict[str, float], cluster: Cluster, dtype: str, size: float) -> dict[str, float]:
    return {kind: count / cluster.rate(kind, dtype, size) for kind, count in flops.items() if count}


def matrix_seconds(optimizer: Any, info: MatrixInfo, cost: Cost, cluster: Cluster) -> tuple[dict[str, float], float]:
    """Seconds of one whole matrix on one device: by kernel class in an ordinary step, and what a refresh adds."""
    dtype, size = dtype_of(optimizer), size_of(optimizer, info)
    ordinary = _seconds(cost.flops, cluster, dtype, size)
    ordinary["element-wise"] = cluster.pass_seconds(cost.elementwise_bytes)
    ordinary["host"] = cluster.overheads.of_matrix(optimizer.name)
    return ordinary, sum(_seconds(cost.refresh, cluster, dtype, size).values())


def shard_group_time(shard_group: ShardGroupPlan, layout: Layout, cluster: Cluster) -> OptimizerTime:
    """One shard group's step, by its slowest rank."""
    ranks = shard_group.ranks
    seconds: list[dict[str, float]] = [{} for _ in range(ranks)]
    refresh, owned = [0.0] * ranks, [0.0] * ranks
    time = OptimizerTime(asynchronous=not cluster.shared_cores)
    timed: dict[tuple[Any, ...], tuple[dict[str, float], float]] = {}
    for part in shard_group.plan.parts:
        name = part.matrix
        info, optimizer, cost = shard_group.infos[name], shard_group.optimizers[name], shard_group.costs[name]
        key = likeness(optimizer, info)
        if key not in timed:
            timed[key] = matrix_seconds(optimizer, info, cost, cluster)
        ordinary, extra = timed[key]
        rows, columns = part.buffer_shape
        share = rows * columns / (part.shape[0] * part.shape[1])
        for kind, value in ordinary.items():
            seconds[part.rank][kind] = seconds[part.rank].get(kind, 0.0) + value * (1.0 if kind == "host" else share)
        refresh[part.rank] += extra * share
        owned[part.rank] += share * part.shape[0] * part.shape[1]
        if extra:
            time.refresh_every = max(time.refresh_every, cost.refresh_every)
        time.staggered = time.staggered or bool(getattr(optimizer.config, "stagger", False))
    every = time.refresh_every
    slowest = max(range(ranks), key=lambda rank: sum(seconds[rank].values()) + refresh[rank] / every)
    work = dict(seconds[slowest])
    element, state = _element_wise(shard_group, layout, cluster)
    time.element_wise = work.pop("element-wise", 0.0) + element
    over = cluster.overheads
    cut_over = shard_group.data if layout.distributed else 1
    shards = sum(
        over.by_optimizer.get(entry.optimizer.name, 0.0) * entry.shards / cut_over for entry in shard_group.elements
    )
    time.host = (
        work.pop("host", 0.0) + shards + over.fragment * shard_group.param_shards + over.bucket * shard_group.buckets
    )
    time.by_class, time.refresh = work, refresh[slowest]
    _exchange(time, shard_group, layout, cluster, max(owned))
    slow = cluster.crowding(layout.world) / cluster.optimizer_efficiency
    time.by_class = {kind: value * slow for kind, value in time.by_class.items()}
    time.host, time.refresh = time.host * slow, time.refresh * slow
    time.element_wise *= cluster.crowding(layout.world, memory=True) / cluster.optimizer_efficiency
    time.exchange_hidden = min(
        time.exchange * cluster.overlap * max(0, shard_group.buckets - 1) / max(1, shard_group.buckets), time.compute
    )
    time.flops = sum(cost.mean_flops() for cost in shard_group.costs.values()) * shard_group.plan.instances
    time.state_bytes = max(shard_group.plan.state_bytes) + state
    _offload(time, shard_group, layout, cluster, state)
    time.imbalance = shard_group.plan.imbalance()
    return time


def _offload(time: OptimizerTime, shard_group: ShardGroupPlan, layout: Layout, cluster: Cluster, state: float) -> None:
    """State in host memory: a batch's way in and another's way out under the computation of a third.

    Over B batches, the first comes and the last goes under nothing; each other hides under its share of the step's work.
    """
    if not layout.engine.offloaded:
        return
    if cluster.host is None:
        raise UserError(
            f"--optimizer-cpu-offload: cluster {cluster.name} does not say how fast its hosts' memory is reached; add a "
            "section `host` as in clusters/h100.yaml."
        )
    time.host_bytes = layout.engine.offloaded * time.state_bytes
    time.state_bytes -= time.host_bytes
    if not time.host_bytes:
        return
    batches = shard_group.buckets + math.ceil(state / layout.engine.bucket_bytes)
    time.offload_way = time.host_bytes / cluster.host.bandwidth + batches * cluster.host.latency
    late = max(0.0, time.offload_way - time.compute * cluster.overlap)
    time.offload = (2 * time.offload_way + (batches - 1) * late) / batches


def _element_wise(shard_group: ShardGroupPlan, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Seconds and state bytes, on each rank, of element-wise rules and of the engine's passes."""
    cut_over = shard_group.data if layout.distributed else 1
    local = shard_group.local_elements / cut_over
    moved = local * (layout.parameter_bytes if layout.dtype != "fp32" else 0.0)
    state = 0.0
    for entry in shard_group.elements:
        count = (entry.cut / shard_group.tp + entry.copied) / cut_over
        cost = entry.optimizer.cost(1)
        moved += count * cost.elementwise_bytes
        state += count * cost.state_bytes
    if layout.engine.ema_decay:
        moved += local * AVERAGE_BYTES
        state += local * 4.0
    matrices = shard_group.matrix_numel / shard_group.tp / cut_over
    moved += matrices * (APPLY_BYTES + (TRAVEL_BYTES if shard_group.ranks > 1 else 0.0))
    projected = sum(info.numel for name, info in shard_group.infos.items() if shard_group.optimizers[name].projects)
    moved += projected / shard_group.tp / cut_over * PROJECT_BYTES
    return cluster.pass_seconds(moved) + cluster.read_seconds(local * NORM_BYTES), state


def _exchange(time: OptimizerTime, shard_group: ShardGroupPlan, layout: Layout, cluster: Cluster, owned: float) -> None:
    """Bytes that the fullest sender sends, and their seconds: shards to owners, updates back, factors of cut matrices."""
    ranks = shard_group.ranks
    if ranks == 1 or not shard_group.infos:
        return
    time.sent = dict(shard_group.sent) if shard_group.sent is not None else _estimated(shard_group, layout, owned)
    among = dict.fromkeys(time.sent, ranks // shard_group.plan.instances)
    if "gradients to owners" in among:  # which every instance has
        among["gradients to owners"] = ranks // layout.instances
    time.exchange = sum(cluster.transfer(value, among[what]) for what, value in time.sent.items())
    time.exchange += 2 * max(0, shard_group.buckets - 1) * cluster.link(ranks)[0].latency


def _estimated(shard_group: ShardGroupPlan, layout: Layout, owned: float) -> dict[str, float]:
    """Bytes as if nothing that a shard needs lay on its rank already."""
    ranks, total, tp = len(shard_group.plan.load), shard_group.matrix_numel, shard_group.tp
    if layout.distributed:  # each element is held once an instance; an owner has a share of them itself
        copies = layout.instances // shard_group.plan.instances
        to_owners = total / ranks * (1 - copies / ranks)
        to_shards = owned * (copies - copies / ranks)
    else:  # every data-parallel rank holds its tensor-parallel shard: an owner has one, every holder gets a copy back
        to_owners = total / ranks * (tp - 1) / tp
        to_shards = owned * (ranks / tp - 1 / tp)
    width = layout.communication_bytes
    sent = {"gradients to owners": to_owners * width, "updates to shards": to_shards * width}
    factors = _factor_bytes(shard_group)
    return sent | ({"between shards": max(factors.values())} if factors else {})


def _factor_bytes(shard_group: ShardGroupPlan) -> dict[int, float]:
    """Bytes that each rank sends to the other shards of what is cut."""
    sent: dict[int, float] = {}
    for submatrix in submatrices_of(shard_group.plan.parts):
        if len(submatrix.parts) == 1:
            continue
        name = submatrix.key[0]
        for collective in (
            shard_group.optimizers[name].partition(submatrix.info(shard_group.infos[name])).collectives(submatrix.edges)
        ):
            for index, part in enumerate(submatrix.parts):
                sent[part.rank] = sent.get(part.rank, 0.0) + collective.sent_bytes(index)
    return sent
