"""Ranks that hold the others up: a rank's own time a step is what it does not spend waiting in collectives.

At log intervals, in the all-gather that looks for diverged losses anyway, every rank gives its own time since the last
one. Ranks of one pipeline stage do equal work: over a window of steps, one that needs a multiple of the others' median is
named in the event log, once, until it is no longer so.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from megatron_opt.training import events

_LEAST = 1e-3  # seconds a step below which a difference is noise
_COLLECTIVES = (
    "all_reduce all_gather all_gather_single reduce_scatter_single all_to_all all_to_all_single broadcast barrier send recv "
    "all_gather_into_tensor reduce_scatter_tensor"  # Megatron's
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the watch for slow ranks."""
    group = parser.add_argument_group("megatron_opt stragglers")
    group.add_argument(
        "--straggler-factor",
        type=float,
        default=1.5,
        metavar="X",
        help="name a rank whose own time is above X times the median of its pipeline stage's other ranks "
        "(default 1.5; 0: never)",
    )
    group.add_argument(
        "--straggler-window", type=int, default=50, metavar="STEPS", help="over at least so many steps (default 50)"
    )


class OwnTime:
    """Seconds of training steps in which this process does not wait in a collective, by the host's clock."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._waited = 0.0
        self._inside = False

    def install(self, training: Any) -> None:
        """Time the step, torch.distributed's functions, Megatron's names for them, and waiting for asynchronous ones."""
        import torch
        from megatron.core.tensor_parallel import layers, mappings

        for name in _COLLECTIVES:
            original = getattr(torch.distributed, name)
            timed = self.timed(original)
            setattr(torch.distributed, name, timed)
            for module in (layers, mappings):
                for alias, value in list(vars(module).items()):
                    if value is original:
                        setattr(module, alias, timed)
        torch.distributed.Work.wait = self.timed(torch.distributed.Work.wait)  # type: ignore[method-assign]
        step = training.train_step

        @functools.wraps(step)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            began, waited = time.perf_counter(), self._waited
            result = step(*args, **kwargs)
            self.seconds += time.perf_counter() - began - (self._waited - waited)
            return result

        training.train_step = train_step

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self._waited += time.perf_counter() - began

        return wrapped

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Watch:
    """Collects all ranks' own times and tells who is slow; the same on every rank."""

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.window = factor, window
        self.steps = 0
        self.sums: list[float] = []
        self.named: set[int] = set()

    def see(self, steps: int, own: list[float], stages: list[int]) -> dict[int, tuple[float, float]]:
        """Take each rank's seconds over `steps` more steps; {rank: (its, the others' seconds a step)} newly slow."""
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(own), own, strict=True)]
        self.steps += steps
        if not self.factor or self.steps < self.window:
            return {}
        means = [seconds / self.steps for seconds in self.sums]
        self.steps, self.sums = 0, []
        slow = {}
        for rank, mine in enumerate(means):
            others = [m for r, m in enumerate(means) if r != rank and stages[r] == stages[rank]]
            usual = statistics.median(others) if others else mine
            if mine > self.factor * usual and mine - usual > _LEAST:
                slow[rank] = mine, usual
        new = {rank: times for rank, times in slow.items() if rank not in self.named}
        self.named = set(slow)
        return new


def report(iteration: int, rank: int, times: tuple[float, float]) -> None:
    """By the slow rank itself, which knows its host."""
    mine, usual = times
    events.record(
        "straggler",
        iteration=iteration,
        guilty=[rank],
        seconds=round(mine, 4),
        others=round(usual, 4),
        factor=round(mine / max(usual, 1e-9), 2),
    )
