"""A shard group: the ranks that share a set of logical matrices, what each of them holds, and who computes what.

The dense parameters of one pipeline stage make one shard group (its tensor-, context- and data-parallel ranks), the experts
of one expert-parallel rank in that stage another (its expert-tensor and expert-data-parallel ranks).
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.compute_shards import ComputeShard, Submatrix, shape2d, submatrices_of
from megatron_opt.distributed.exchange import Exchange, Holdings, Route, find_routes
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.ownership import Plan, make_buckets, pack_instances
from megatron_opt.distributed.param_shards import ParamShard
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.kernels import multi_tensor
from megatron_opt.kernels.host import current_device, on_device, sum_by_index
from megatron_opt.kernels.multi_tensor import Coefficients, Sum
from megatron_opt.layout.region import Region, cover_matrix
from megatron_opt.optimizers.base import MatrixInfo


def check_cover(what: str, regions: Iterable[tuple[str, Region]], infos: Mapping[str, MatrixInfo]) -> None:
    """Refuse regions by matrix that do not cover each exactly once."""
    regions_of: dict[str, list[Region]] = {}
    for name, region in regions:
        regions_of.setdefault(name, []).append(region)
    for name, several in regions_of.items():
        if not cover_matrix(several, shape2d(infos[name])):
            raise RuntimeError(
                f"the {what} do not cover {name} {infos[name].shape} exactly once: {sorted(several)[:8]}"
            )


@dataclass
class ShardGroup:
    """Parameter shards of this rank, holdings of all ranks, and the group that they exchange over."""

    name: str
    group: Any
    rank: int
    size: int
    param_shards: list[ParamShard]
    holdings: list[Holdings]
    infos: dict[str, MatrixInfo]
    exchange: Exchange
    fp8_weights: Any = None  # Fp8Weights, where the model keeps some in FP8
    instances: int = 1  # of the distributed optimizer: equal runs of ranks, of which each holds everything
    own_device: torch.device | None = None  # where it is not CUDA's current one

    def __post_init__(self) -> None:
        self.order = {name: index for index, name in enumerate(sorted(self.infos))}
        self.counted = torch.ones(len(self.order), dtype=torch.float64)
        holders = Counter(rect.key for of_rank in self.holdings for _, rect in of_rank)
        check_cover("shards of its ranks", holders, self.infos)
        near = self.size // self.instances
        for first in range(0, self.size, near):
            if {rect.key for of_rank in self.holdings[first : first + near] for _, rect in of_rank} != holders.keys():
                raise RuntimeError(f"{self.name}: ranks {first} to {first + near - 1} are no instance of its shards")
        self.weight = {key: 1.0 / count for key, count in holders.items()}
        rects = [rect for param_shard in self.param_shards for rect in param_shard.rects]
        self._numbers = torch.tensor([self.order[rect.matrix] for rect in rects], dtype=torch.long)
        self._weights = torch.tensor([self.weight[rect.key] for rect in rects], dtype=torch.float64)
        self._tables_on: dict[torch.device, list[Tensor]] = {}
        for param_shard in self.param_shards:
            if not param_shard.view.counts:
                for rect in param_shard.rects:
                    self.counted[self.order[rect.matrix]] = 0.0
        self.counted = self.sum_over_ranks(1.0 - self.counted).eq(0).double()

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors are, also where it holds no parameter shard."""
        return self.own_device or current_device()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All-reduce over the shard group; values are float64, and stay where they are, on the CPU or this rank's device."""
        if self.size == 1:
            return values
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved, group=self.group)
        return moved.to(values.device)

    def sum_per_matrix(self, values: Tensor) -> Tensor:
        """From one value for each rectangle of each parameter shard in turn, float64, the sum over each whole matrix, replicas
        counted once.
        """
        numbers, weights = self._tables(values.device)
        return self.sum_over_ranks(sum_by_index(values * weights, numbers, len(self.order)))

    def _tables(self, device: torch.device) -> list[Tensor]:
        """Numbers and weights of the rectangles, on a device."""
        if device not in self._tables_on:
            self._tables_on[device] = [on_device(table, device) for table in (self._numbers, self._weights)]
        return self._tables_on[device]

    def squared_norms(self, flats: Sequence[Tensor]) -> Tensor:
        """Σx² of every whole matrix, (matrices,) float64 on the device, from flat tensors by parameter shard: one pass over them."""
        runs = [
            rect.run(flat)
            for param_shard, flat in zip(self.param_shards, flats, strict=True)
            for rect in param_shard.rects
        ]
        if not runs:
            return self.sum_per_matrix(torch.zeros(0, dtype=torch.float64, device=self.device))
        return self.sum_per_matrix(multi_tensor.sums(Sum.GRADIENT_NORM, runs, Coefficients())[:, 0])


@dataclass
class MatrixPlan:
    """Placement of the matrices that matrix rules take, and the routes to it.

    Where instances follow the plan each by itself, `parts` and `routes` are this rank's instance's.
    """

    plan: Plan
    parts: dict[tuple[str, int], ComputeShard]
    submatrices: list[Submatrix]
    buckets: list[list[str]]
    routes: list[Route]
    counts: bool  # whether what this rank computes is to be summed over ranks; else an earlier instance has the same

    @staticmethod
    def make(shard_group: ShardGroup, jobs: Sequence[Job], options: EngineOptions) -> "MatrixPlan":
        """Plan and routes; equal on every rank of the shard group."""
        plan = pack_instances(jobs, shard_group.size, shard_group.instances, options)
        check_cover("parts of its plan", ((part.matrix, part.bounds) for part in plan.parts), shard_group.infos)
        ranks = shard_group.size // plan.instances
        first = shard_group.rank // ranks * ranks
        parts = [replace(part, rank=first + part.rank) for part in plan.parts]
        holdings = [
            of_rank if first <= rank < first + ranks else [] for rank, of_rank in enumerate(shard_group.holdings)
        ]
        buckets = make_buckets(plan.parts, ranks, options.bucket_bytes, shard_group.exchange.dtype.itemsize)
        routes = find_routes(holdings, parts, shard_group.rank, buckets, shard_group.size // shard_group.instances)
        return MatrixPlan(plan, {part.key: part for part in parts}, submatrices_of(parts), buckets, routes, first == 0)


def gather_objects(value: Any, group: Any, size: int) -> list[Any]:
    """One picklable object from every rank of a group."""
    if size == 1:
        return [value]
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, value, group=group)
    return objects


@contextlib.contextmanager
def refused_alike(group: Any, size: int) -> Iterator[None]:
    """A block without collectives: what one rank refuses in it, every rank of the group refuses. Collective at its end."""
    complaint = None
    try:
        yield
    except UserError as error:
        complaint = str(error)
    for said in gather_objects(complaint, group, size):
        if said:
            raise UserError(said)


def process_group(key: Any) -> tuple[Any, int, int, list[Any]]:
    """Process group of the ranks with this rank's key, this rank's place in it, its size, and all keys by rank."""
    world = dist.get_world_size()
    keys = gather_objects(key, None, world)
    mine, me = None, dist.get_rank()
    if len(set(keys)) == 1:
        return dist.group.WORLD, me, world, keys
    for each in sorted(set(keys)):
        ranks = [rank for rank, other in enumerate(keys) if other == each]
        group = dist.new_group(ranks)
        if each == key:
            mine, members = group, ranks
    return mine, members.index(me), len(members), keys


def agree(what: str, value: str, group: Any, size: int) -> None:
    """Refuse to start where ranks differ in what they must have in common."""
    values = gather_objects(value, group, size)
    if len(set(values)) > 1:
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        raise UserError(
            f"ranks disagree on the {what}: ranks {odd[:8]} of the group have {values[odd[0]]}, rank 0 has "
            f"{values[0]}; start all ranks with the same flags and the same version of megatron_opt."
        )
