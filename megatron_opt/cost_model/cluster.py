"""A cluster file: what one device sustains by kernel class and size, its memory, and the links between devices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import pairwise
from pathlib import Path

import yaml

from megatron_opt import yaml_files
from megatron_opt.errors import UserError
from megatron_opt.training.flags.fp8 import check_hardware

CLASSES = ("gemm", "small_gemm", "qr", "eigh", "solve", "attention")
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")
LAYER = "layer"  # products of the model's layers; where a file has no such rates, those of `gemm`
Curve = tuple[tuple[float, float], ...]  # (size, FLOP/s), rising sizes


@dataclass(frozen=True)
class Link:
    """Bytes per second that one device sends (sustained), and seconds of one message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Overheads:
    """Host seconds outside kernels: of each matrix, held fragment, bucket, optimizer step."""

    matrix: float = 0.0
    fragment: float = 0.0
    bucket: float = 0.0
    step: float = 0.0
    layer: float = 0.0  # each layer of each micro-batch, forward and backward
    reduction: float = 0.0  # an all-reduce of a few numbers amid other work, where that takes longer than its latency
    by_optimizer: Mapping[str, float] = field(
        default_factory=dict
    )  # a matrix's or slice's, where a rule's own was measured

    def of_matrix(self, optimizer: str) -> float:
        """Host seconds of one matrix of a rule."""
        return self.by_optimizer.get(optimizer, self.matrix)


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind, `gpus_per_node` to a node; rates are sustained FLOP/s of one device working alone."""

    name: str
    title: str
    peak: Mapping[str, float]
    memory: float
    reserved: float
    passes: Curve  # bytes/s that element-wise passes sustain, over the bytes that they move
    reads: Curve  # the same of passes that write nothing
    rates: Mapping[str, Mapping[str, Curve]]  # class → dtype → curve over the smaller side
    gpus_per_node: int
    node: Link
    network: Link
    host: Link | None = None  # to the host's memory, each way at once; None: not known
    devices: int | None = None  # limit of the cluster; None: as many as asked for
    step_efficiency: float = 1.0  # share of a step in which kernels run: launch gaps, stragglers
    optimizer_efficiency: float = 1.0
    overlap: float = 1.0  # share of a transfer that can run under computation
    shared_cores: int = 0  # CPU: ranks beyond this number of cores take turns
    together: tuple[float, float] = (1.0, 1.0)  # share of products' and passes' rates when all cores work at once
    collectives: Mapping[str, float] = field(default_factory=dict)  # share of the links' bandwidth by kind; else 1
    overheads: Overheads = field(default_factory=Overheads)
    sources: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None  # of CUDA; decides which FP8 recipes there are
    measured: bool = False  # its rates are those of the machine itself (`cost calibrate`), not of data sheets

    def rate(self, kind: str, dtype: str, size: float) -> float:
        """Sustained FLOP/s of a kernel class at a size (smaller side of a product, order of a factorization)."""
        by_type = self.rates.get(kind) or self.rates["gemm"]
        if dtype == "fp8" and dtype not in by_type and kind == LAYER:  # `cost calibrate` measures none
            by_type = self.rates["gemm"]
        curve = by_type.get(dtype) or by_type.get("fp32") or next(iter(by_type.values()))
        return interpolate(curve, size)

    @property
    def transposes(self) -> bool:
        """Whether FP8 products take operands in one order only, so that transposed copies are kept: before Blackwell."""
        return self.capability is None or self.capability < (10, 0)

    def check_fp8(self, recipe: str) -> None:
        """Refuse a recipe that these devices lack, and FP8 where the file has no rate of its products."""
        if not any("fp8" in self.rates.get(kind, {}) for kind in (LAYER, "gemm")):
            raise UserError(
                f"cluster {self.name} has no rate of FP8 products; leave out --fp8-format, or add rates.layer.fp8 to its file."
            )
        if self.capability is not None:
            check_hardware(recipe, self.capability)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of element-wise passes over more than any cache holds."""
        return self.passes[-1][1]

    def pass_seconds(self, moved: float) -> float:
        """Seconds of element-wise passes that move so many bytes in all."""
        return moved / interpolate(self.passes, moved) if moved else 0.0

    def read_seconds(self, read: float) -> float:
        """Seconds of a pass that reads so many bytes and writes none."""
        return read / interpolate(self.reads, read) if read else 0.0

    def reduction(self, ranks: int) -> float:
        """Seconds of an all-reduce of a few numbers in the midst of a step."""
        return max(self.link(ranks)[0].latency, self.overheads.reduction) if ranks > 1 else 0.0

    def link(self, ranks: int, stride: int = 1) -> tuple[Link, float]:
        """The link that binds a group of `ranks` devices, `stride` apart; and the share of traffic on it."""
        if ranks <= 1:
            return self.node, 0.0
        inside = max(1, self.gpus_per_node // stride)
        if ranks <= inside:
            return self.node, (ranks - 1) / ranks
        return self.network, (ranks - inside) / ranks

    def transfer(self, bytes_sent: float, ranks: int, stride: int = 1) -> float:
        """Seconds of an all-to-all in which each rank sends `bytes_sent` to the others in equal parts."""
        if ranks <= 1 or bytes_sent <= 0:
            return 0.0
        inside = min(max(1, self.gpus_per_node // stride), ranks)
        near = bytes_sent * (inside - 1) / (ranks - 1)
        far = bytes_sent - near
        link = self.network if ranks > inside else self.node
        return max(near / self.node.bandwidth, far / self.network.bandwidth) + link.latency * (1 + ranks / 32)

    def ring(self, bytes_sent: float, ranks: int, stride: int = 1, kind: str = "") -> float:
        """Seconds of a ring collective in which each rank sends `bytes_sent` in all: its slowest link binds.

        `kind` is one of COLLECTIVES, or "" for messages between two ranks.
        Where `inside` ranks share a node, NCCL runs that many rings, so that the network carries 1/inside of each.
        """
        if ranks <= 1 or bytes_sent <= 0:
            return 0.0
        inside = min(max(1, self.gpus_per_node // stride), ranks)
        hops = math.ceil(math.log2(ranks))
        bytes_sent /= self.collectives.get(kind, 1.0)
        if ranks <= inside:
            return bytes_sent / self.node.bandwidth + hops * self.node.latency
        through_network = bytes_sent / (self.network.bandwidth * inside)
        return max(bytes_sent / self.node.bandwidth, through_network) + hops * self.network.latency

    def crowding(self, ranks: int, memory: bool = False) -> float:
        """How many times slower each rank's products (or passes) are because ranks share cores; 1 on GPUs."""
        if not self.shared_cores or ranks == 1:
            return 1.0
        return max(1.0, ranks / self.shared_cores) / self.together[memory]


def interpolate(curve: Curve, size: float) -> float:
    """Straight lines in log size and log rate; constant beyond the ends."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if size <= x1:
            share = math.log(size / x0) / math.log(x1 / x0)
            return math.exp(math.log(y0) + share * math.log(y1 / y0))
    return curve[-1][1]


def names() -> list[str]:
    """Clusters that come with the package."""
    folder = resources.files("megatron_opt") / "cost_model" / "clusters"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load(which: str) -> Cluster:
    """A cluster by name or by the path of its file; raises UserError for what cannot be a cluster."""
    from megatron_opt.cost_model.cluster_file import Reader

    if which in names():
        text = (resources.files("megatron_opt") / "cost_model" / "clusters" / f"{which}.yaml").read_text()
    elif Path(which).is_file():
        try:
            text = Path(which).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise UserError(f"cluster file {which} cannot be read ({error}).") from error
    else:
        raise UserError(
            f"--cluster: there is no cluster {which!r}; there are {', '.join(names())}, or give the path of a file."
        )
    try:
        content = yaml_files.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{which} is not YAML: {' '.join(str(error).split())}.") from error
    return Reader(which).cluster(content, Path(which).stem)
