"""Adam-mini's direction for many tensors in one call: blocks of elements share one second moment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opt.kernels.dispatch import Operation
from megatron_opt.kernels.multi_tensor import Coefficients


@torch.no_grad()
def _reference(
    grads: Sequence[Tensor],
    moments: Sequence[Tensor],
    seconds: Sequence[Tensor],
    directions: Sequence[Tensor],
    coefficients: Sequence[float],
) -> None:
    c = Coefficients(*coefficients)
    for g, m, v, u in zip(grads, moments, seconds, directions, strict=True):
        blocks, count = v.numel(), g.numel() // max(v.numel(), 1)
        mean = torch.linalg.vector_norm(g.reshape(blocks, count), dim=1).square() / max(count, 1)
        v.mul_(c.beta2).add_(c.input_weight2 * mean.view(v.shape))
        m.mul_(c.beta1).add_(g, alpha=c.input_weight1)
        scale = c.momentum_weight / (v.sqrt() * c.inv_sqrt_correction2 + c.eps)
        u.copy_((m.reshape(blocks, count) * scale.view(blocks, 1)).view(g.shape))


_block_adam = Operation(
    "block_adam",
    "(Tensor[] grads, Tensor(a!)[] moments, Tensor(b!)[] seconds, Tensor(c!)[] directions, float[] coefficients) -> ()",
    _reference,
    lambda *arguments: None,
)


def block_adam(
    grads: Sequence[Tensor], moments: Sequence[Tensor], seconds: Sequence[Tensor], coefficients: Coefficients
) -> list[Tensor]:
    """m ← EMA(g);  v ← EMA(mean of g² over a block);  returns m̂/(√v̂ + ε) for each tensor. 16 bytes an element.

    `seconds` have one number for each of a tensor's equal runs of elements. Moments change in place. arXiv 2406.16793.
    Raises RuntimeError on tensors that are not contiguous or do not fit together.
    """
    if not grads:
        return []
    directions = [torch.empty_like(g) for g in grads]
    arguments = (list(grads), list(moments), list(seconds), directions, list(coefficients))
    if all(x.dtype == torch.float32 and x.is_contiguous() for x in (*grads, *moments, *seconds)):
        _block_adam(grads[0].device, *arguments)
    else:
        _reference(*arguments)
    return directions
