"""A moving average of the weights, for evaluation: ā ← D·ā + (1 − D)·W after each step, ā = W after the first.

In fp32, of each rank's own main copies: sharded as these are, and in checkpoints beside them by logical name.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_opt.distributed.param_shards import ParamShard
from megatron_opt.distributed.post_steps import Report
from megatron_opt.distributed.shard_group import ShardGroup

KEY = "ema"  # among what a parameter shard keeps


class WeightAverage:
    """A post-step that changes no weight; for an evaluation the average and the weights change places."""

    def __init__(self, shard_groups: Sequence[ShardGroup], decay: float) -> None:
        self.decay = decay
        self.begun = False  # whether it is an average yet, by a step or from a checkpoint
        self.stored = True  # whether the checkpoint that is loaded has one
        param_shards = [param_shard for shard_group in shard_groups for param_shard in shard_group.param_shards]
        self._mains = [param_shard.main for param_shard in param_shards]
        for param_shard in param_shards:
            param_shard.state[KEY] = param_shard.main.clone()
        self._averages = [param_shard.state[KEY] for param_shard in param_shards]

    def begin(self) -> None:
        """Nothing to forget."""

    def prepare(self) -> None:
        """Nothing travels."""

    def run(self, step: int) -> Collection[ParamShard]:
        """One pass over both."""
        if self.begun and self._mains:
            torch._foreach_lerp_(self._averages, self._mains, 1.0 - self.decay)
        self.settle()
        self.begun = True
        return ()

    def report(self) -> Report | None:
        """Evaluations tell."""
        return None

    @torch.no_grad()
    def settle(self) -> None:
        """Before it is one, it is the weights."""
        if not self.begun and self._mains:
            torch._foreach_copy_(self._averages, self._mains)

    def loaded(self) -> None:
        """After a checkpoint's state; where that had no average, this one begins at its weights."""
        self.begun = self.stored
        self.settle()
        self.begun = self.stored = True

    @contextmanager
    def in_place(self, publish: Callable[[], None], settle: Callable[[], None] = lambda: None) -> Iterator[None]:
        """The model computes with the average; afterwards with the weights, bit for bit as they were.

        `settle` waits for who still copies both; `publish` brings main copies to the model's parameters on all ranks.
        """
        settle()
        self._swap()
        publish()
        try:
            yield
        finally:
            self._swap()
            publish()

    @torch.no_grad()
    def _swap(self) -> None:
        for main, average in zip(self._mains, self._averages, strict=True):
            kept = main.clone()
            main.copy_(average)
            average.copy_(kept)
