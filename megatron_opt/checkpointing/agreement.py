"""What all ranks must know alike before they go on: each function is a collective."""

import functools
from collections.abc import Callable
from typing import Any


def rank() -> int:
    """This process's rank; no collective."""
    import torch

    return int(torch.distributed.get_rank())


def last_rank() -> bool:
    """Whether this is the last rank, which has the loss; no collective."""
    import torch

    return bool(torch.distributed.get_rank() == torch.distributed.get_world_size() - 1)


def agree(value: Any) -> Any:
    """Rank 0's value on every rank."""
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def anywhere(here: bool) -> bool:
    """Whether it is so on any rank."""
    return each_anywhere(here)[0]


def each_anywhere(*here: bool) -> list[bool]:
    """Which of these are so on any rank."""
    import torch

    from megatron_opt.kernels.host import current_device

    flags = torch.tensor([int(one) for one in here], device=current_device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def first_error(error: str | None) -> str | None:
    """The lowest rank's error, on every rank."""
    import torch

    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, error)
    return next((f"rank {index}: {text}" for index, text in enumerate(errors) if text), None)


def refused_by_all(check: Callable[..., None]) -> Callable[..., None]:
    """Megatron's check of a state, which rank 0 makes alone while others go on: what it refuses, every rank refuses.

    The exception then has `of_all_ranks`.
    """

    @functools.wraps(check)
    def checked(*args: Any, **kwargs: Any) -> None:
        from megatron.core.dist_checkpointing.mapping import CheckpointingException

        error = None
        try:
            check(*args, **kwargs)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        if error := first_error(error):
            refused = CheckpointingException(error)
            refused.of_all_ranks = True  # type: ignore[attr-defined]
            raise refused

    return checked
