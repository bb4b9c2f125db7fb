"""An all-reduce over one rank of a processor has nothing to do; gloo hands it to its thread and waits: a sixth of a small step."""

from typing import Any

import torch
from torch import Tensor

from megatron_opt.platform.replacement import Replacement


def _all_reduce(
    tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """torch's function, but for a group of this rank alone, whose sum, maximum and mean is the tensor itself."""
    if not async_op and tensor.device.type == "cpu" and torch.distributed.get_world_size(group) == 1:
        return None
    return ALL_REDUCE.original()(tensor, op, group, async_op)


ALL_REDUCE = Replacement("torch.distributed", "all_reduce", _all_reduce, honours=None)
