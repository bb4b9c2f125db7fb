"""LayerNorm and RMSNorm, forward and backward, in fp32 inside; `centered`: the gain is 1 + weight."""

from typing import Any

import torch
from torch import Tensor

from megatron_opt.platform.transformer_engine.casts import quantize
from megatron_opt.platform.transformer_engine.extension import operation, torch_dtype


def _gain(weight: Tensor, centered: bool) -> Tensor:
    return weight.float() + 1 if centered else weight.float()


def _result(y: Tensor, x: Tensor, out: Tensor | None, quantizer: Any, dtype: Any) -> Any:
    y = y.to(torch_dtype(dtype, x.dtype))
    if quantizer is not None:
        return quantize(y, quantizer, out)
    if out is None:
        return y
    out.copy_(y)
    return out


@operation
def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> tuple[Any, None, Tensor]:
    """(x/rms(x)·gain, None, 1/rms by row) of x (rows, n)."""
    inverse = torch.rsqrt(x.float().pow(2).mean(-1) + eps)  # (rows,)
    y = x.float() * inverse[:, None] * _gain(weight, centered)
    return _result(y, x, out, quantizer, dtype), None, inverse


@operation
def rmsnorm_bwd(
    dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight)."""
    normed = x.float() * inverse[:, None]
    d = dy.float() * _gain(weight, centered)
    dx = inverse[:, None] * (d - normed * (d * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype)


@operation
def rmsnorm_bwd_add(
    dy: Tensor, x: Tensor, add: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """(dx + add, dweight)."""
    dx, dweight = rmsnorm_bwd(dy, x, inverse, weight, margin, centered)
    return dx + add.view(dx.shape), dweight


@operation
def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    centered: bool,
) -> tuple[Any, Tensor, Tensor]:
    """((x − mean)/σ·gain + bias, mean by row, 1/σ by row)."""
    mean = x.float().mean(-1)
    inverse = torch.rsqrt((x.float() - mean[:, None]).pow(2).mean(-1) + eps)
    y = (x.float() - mean[:, None]) * inverse[:, None] * _gain(weight, centered) + bias.float()
    return _result(y, x, out, quantizer, dtype), mean, inverse


@operation
def layernorm_bwd(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    normed = (x.float() - mean[:, None]) * inverse[:, None]
    d = dy.float() * _gain(weight, centered)
    dx = inverse[:, None] * (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dy.float() * normed).sum(0).to(weight.dtype), dy.float().sum(0).to(weight.dtype)
