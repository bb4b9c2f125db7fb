"""The weights to evaluate of rules that take gradients at others (schedule-free): x = p − lead, for a while in their place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_opt.distributed.elementwise import ElementwiseStep


class EvaluationWeights:
    """Of this rank's main copies that a rule with a `lead_key` trains."""

    def __init__(self, element_steps: Sequence[ElementwiseStep]) -> None:
        self._runs = [
            (run, step.shard_group.param_shards[run.param_shard], optimizer.lead_key)
            for step in element_steps
            for index, optimizer in enumerate(step.group_optimizers)
            if getattr(optimizer, "lead_key", None)
            for run in step.slices.get(index, ())
        ]
        self.differ = any(  # alike on every rank
            getattr(optimizer, "lead_key", None) for step in element_steps for optimizer in step.group_optimizers
        )

    @contextmanager
    def in_place(self, publish: Callable[[], None], settle: Callable[[], None] = lambda: None) -> Iterator[None]:
        """The model computes with x; afterwards with the weights, bit for bit as they were.

        `settle` waits for who still copies the weights; `publish` brings main copies to the model's parameters on all ranks.
        Takes 4 bytes an element of this rank's meanwhile.
        """
        if not self.differ:
            yield
            return
        settle()
        mains = [run.rect.run(param_shard.main) for run, param_shard, _ in self._runs]
        kept = [main.clone() for main in mains]
        self._put([main - run.state[key].to(main) for main, (run, _, key) in zip(mains, self._runs)], mains, publish)
        try:
            yield
        finally:
            self._put(kept, mains, publish)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor], mains: Sequence[Tensor], publish: Callable[[], None]) -> None:
        for main, value in zip(mains, values, strict=True):
            main.copy_(value)
        publish()
