"""MXFP8 weights that forward passes gather: main copies lie among the gradients only where a gather will take them away."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_opt.distributed.fp8_weights import Fp8Weights


def _weights(hooks: bool, dispatched: bool) -> tuple[Fp8Weights, torch.Tensor]:
    """One parameter of 6 elements from place 4 of a buffer, of which this rank holds the last four."""
    param: Any = object()
    memory = torch.zeros(12)
    buffer = SimpleNamespace(param_index_map={param: (4, 10, 0)}, param_data=memory)
    chunk = SimpleNamespace(
        buffers=[buffer],
        expert_parallel_buffers=[],
        remove_forward_pre_hook_handles={0: None} if hooks else {},
        param_to_bucket_group={param: SimpleNamespace(param_gather_dispatched=dispatched)},
    )
    return Fp8Weights([param], [torch.arange(1.0, 5.0)], [2], None, [chunk], True), memory


@pytest.mark.parametrize("hooks, dispatched, lies", [(True, False, True), (True, True, False), (False, False, False)])
def test_main_copies_lie_where_the_next_pass_gathers_them(hooks: bool, dispatched: bool, lies: bool) -> None:
    """Not in the first step, whose passes gather nothing, nor after an evaluation, which has gathered."""
    weights, memory = _weights(hooks, dispatched)
    weights.publish_late()
    assert memory.tolist() == ([0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0] if lies else [0] * 12)


def test_a_forced_gather_takes_all() -> None:
    weights, memory = _weights(hooks=False, dispatched=True)
    weights.publish_late()
    weights.publish()
    assert memory[6:10].tolist() == [1, 2, 3, 4]
