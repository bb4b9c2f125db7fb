"""Between host and device without a wait: small tables to the device, sums that stay there."""

from collections.abc import Sequence

import torch
from torch import Tensor


def current_device() -> torch.device:
    """CUDA's current one, with its index; the CPU where the platform answers for CUDA."""
    return torch.device(torch.cuda.current_device())


def on_device(values: Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host on a device; the host goes on at once."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.to(device=device, dtype=dtype, non_blocking=True)


def sum_by_index(values: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Σ of values (n,) with the same number, (count,), in their order: the same bits every time, on GPUs too."""
    return values.new_zeros(count).index_put_((numbers,), values, accumulate=True)
