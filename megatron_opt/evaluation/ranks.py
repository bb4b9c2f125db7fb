"""The processes of an evaluation: rank 0 asks, every rank computes its share, rank 0 gets the answers.

Requests and answers travel between hosts by gloo, what the model computes between devices: gloo or NCCL.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from megatron_opt import platform
from megatron_opt.errors import UserError
from megatron_opt.training import entry


@contextlib.contextmanager
def world(tp: int, pp: int) -> Iterator[None]:
    """Megatron's process groups of this layout over the ranks that a launcher has started, or over this one process.

    What is left of the ranks is data-parallel. Raises UserError, alike on every rank, where they do not fit.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    ranks = entry.check_launcher()[1]
    if dist.is_initialized():
        raise UserError("an evaluation makes its own process groups; start it as a command of its own.")
    if ranks % (tp * pp):
        raise UserError(
            f"{ranks} ranks are no multiple of --tensor-model-parallel-size {tp} times --pipeline-model-parallel-size "
            f"{pp}; start as many by torchrun --nproc-per-node {tp * pp}."
        )
    if not platform.on_cpu():
        _take_device()
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if ranks == 1 else {}
    dist.init_process_group("gloo" if platform.on_cpu() else "cpu:gloo,cuda:nccl", **alone)
    try:
        ps.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
        yield
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()


def _take_device() -> None:
    """One GPU a rank."""
    import torch

    mine, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if mine >= there:
        raise UserError(
            f"rank {mine} of this machine finds {there} GPUs; start one process a GPU, or give --device cpu."
        )
    torch.cuda.set_device(mine)


def from_first(value: Any = None) -> Any:
    """Rank 0's value, on every rank."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def to_first(value: Any) -> list[Any]:
    """Every rank's value on rank 0, nothing elsewhere."""
    import torch.distributed as dist

    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered or []


@contextlib.contextmanager
def together() -> Iterator[bool]:
    """A block that rank 0 alone goes through (it is told so): what it refuses there, every rank refuses."""
    import torch.distributed as dist

    first = dist.get_rank() == 0
    try:
        yield first
    except UserError as error:
        if first:
            from_first(str(error))
        raise
    if refused := from_first():
        raise UserError(refused)
