"""The background save that is on its way to disk, as all ranks see it: one small sum over the ranks a step, read at the next.

Megatron's queue asks all ranks, waits for the slowest, and gathers what each has written; here the writers find each
other's files, and the ranks only have to learn how it ended.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt.checkpointing import agreement
from megatron_opt.checkpointing.background import Publication, Writer
from megatron_opt.checkpointing.snapshot import Request

_GOING_ON, _TROUBLE, _PUBLISHED = range(3)
_PATIENCE = 0.005  # seconds between two looks of a rank that waits for the end


@dataclass(frozen=True)
class Ended:
    """How a save ended; all ranks get the same trouble, rank 0 what was published."""

    iteration: int
    trouble: str | None
    size: int
    pruned: list[int]
    announcements: list[Callable[[], None]]


class PendingSave:
    """At most one save of a rank's writer."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self._iteration: int | None = None
        self._announcements: list[Callable[[], None]] = []
        self._unheard = False  # the rank's own part has not been heard of
        self._trouble: str | None = None
        self._published: dict[str, Any] | None = None
        self._asked: tuple[Any, Any] | None = None  # the sum that is under way

    def begin(
        self, request: Request, notes: dict[str, str], save: Path, iteration: int, keep_last: int, keep_every: int
    ) -> None:
        """Hand a save over to the writers; not before the last one has ended."""
        import torch

        rank, plan = agreement.rank(), request.plan
        self._iteration, self._announcements = iteration, request.announcements
        self._unheard, self._trouble, self._published = True, None, None
        self.writer.save(
            request.folder, rank, plan.items, request.strings, request.tensors, request.constant_until_step, notes
        )
        if rank == 0:
            ranks = torch.distributed.get_world_size()
            self.writer.publish(
                Publication(save, iteration, ranks, plan.metadata, request.config, keep_last, keep_every)
            )

    def _state(self) -> int:
        """What this rank knows."""
        if self._unheard and not self.writer.busy():
            self._unheard, self._trouble = False, self.writer.written()
        if agreement.rank() == 0 and self._published is None and self._trouble is None:
            answer = self.writer.published(block=False)
            if isinstance(answer, dict):
                self._published = answer
            elif answer is not None:
                self._trouble = answer
        if self._published is not None:
            return _PUBLISHED
        return _GOING_ON if self._trouble is None else _TROUBLE

    def _ask(self) -> tuple[Any, Any]:
        import torch

        from megatron_opt.kernels.host import current_device

        state = torch.tensor([self._state()], device=current_device())
        return state, torch.distributed.all_reduce(state, op=torch.distributed.ReduceOp.MAX, async_op=True)

    def look(self, blocking: bool) -> Ended | None:
        """Collective: how the save ended, None where there is none or it goes on; `blocking` waits for the end."""
        while self._iteration is not None:
            if self._asked is None:
                self._asked = self._ask()
                if not blocking:
                    return None
            state, work = self._asked
            work.wait()
            self._asked = None
            if (outcome := int(state.item())) != _GOING_ON:
                return self._end(outcome)
            if blocking:
                time.sleep(_PATIENCE)
        return None

    def _end(self, outcome: int) -> Ended:
        trouble = None
        if outcome == _TROUBLE:
            self.writer.wait()
            if self._unheard:
                self._trouble = self.writer.written()
            if agreement.rank() == 0:
                self.writer.cancel()
                self.writer.published(block=True)
            trouble = agreement.first_error(self._trouble) or "the writers do not say why"
        iteration, self._iteration = self._iteration, None
        assert iteration is not None
        done = self._published or {"bytes": 0, "pruned": []}
        return Ended(iteration, trouble, done["bytes"], done["pruned"], self._announcements)
