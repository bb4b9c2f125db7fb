"""Matrix products as the layers ask for them: of torch's own precision, or of FP8 operands with exact sums."""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_opt.platform.transformer_engine import blocks
from megatron_opt.platform.transformer_engine.casts import decode, quantize
from megatron_opt.platform.transformer_engine.extension import operation, torch_dtype


def _operand(x: Any, columnwise: bool = False) -> tuple[Tensor, Tensor | None]:
    """(matrix, one factor or None for 1), FP8 in fp64; `columnwise`: by the scales of its columns."""
    if hasattr(x, "_is_2D_scaled"):
        return blocks.decode_blockwise(x, columnwise), None
    if hasattr(x, "_with_gemm_swizzled_scales"):
        return blocks.decode_mx(x, columnwise), None
    if hasattr(x, "_scale_inv"):
        values, inverse = decode(x)
        return values, inverse.double()
    return x.reshape(-1, x.shape[-1]), None


def product(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> Tensor:
    """op(b)·op(a), cuBLAS's A and B being column-major. FP8 products are exact and summed in fp64, whatever the order."""
    left, left_factor = _operand(b, columnwise=transpose_b)  # (rows, k) or its transpose
    right, right_factor = _operand(a, columnwise=not transpose_a)
    left = left.t() if transpose_b else left
    right = right.t() if transpose_a else right
    if torch.float64 not in (left.dtype, right.dtype):
        return left @ right
    found = left.double() @ right.double()
    factors = [factor for factor in (left_factor, right_factor) if factor is not None]
    return (found.mul_(math.prod(factors)) if factors else found).float()


@operation
def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **options: Any,
) -> tuple[Any, Tensor | None, None, None]:
    """(product plus bias, bias gradient of a backward product, None, None)."""
    assert not gelu and options.get("comm_overlap") is None, "neither fused GELU nor overlapped exchange exist on CPU"
    y = product(a, transpose_a, b, transpose_b)
    bias_grad = None
    if bias is not None and grad:
        rows, inverse = _operand(b, columnwise=transpose_b)
        bias_grad = (rows if inverse is None else rows * inverse).sum(0).to(bias.dtype)
    elif bias is not None:
        y = y + bias.to(y.dtype)
    dtype = torch_dtype(out_dtype, y.dtype if y.dtype != torch.float32 or out is None else out.dtype)
    lead = [y.shape[0]] if transpose_b else list(b.size())[:-1]
    y = y.to(dtype).reshape(*lead, y.shape[-1])
    if out is not None:
        out.copy_(out + y if accumulate else y)
        y = out
    return (quantize(y, quantizer) if quantizer is not None else y), bias_grad, None, None


@operation
def te_general_grouped_gemm(
    a: list[Any],
    transpose_a: bool,
    b: list[Any],
    transpose_b: bool,
    out: list[Tensor],
    out_dtype: Any,
    rows: list[int] | None,
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: list[Tensor],
    grad: bool,
    *rest: Any,
) -> list[Tensor]:
    """One product a group, into `out` a group or into runs of rows of out[0]; returns bias (its gradient, when `grad`)."""
    accumulate = bool(rest[2])  # workspaces, their size, accumulate, …
    targets = list(out[0].split(list(rows or []))) if single_output else out
    for i, target in enumerate(targets):
        has_bias = bool(bias[i].numel())
        if target.numel() == 0:
            continue
        if b[i].size()[0] == 0:
            if not accumulate:
                target.zero_()
            if grad and has_bias:
                bias[i].zero_()
            continue
        y = product(a[i], transpose_a, b[i], transpose_b)
        if has_bias and grad:
            matrix, inverse = _operand(b[i], columnwise=transpose_b)
            bias[i].copy_((matrix if inverse is None else matrix * inverse).sum(0))
        elif has_bias:
            y = y + bias[i].to(y.dtype)
        target.copy_((target + y if accumulate else y).view(target.shape))
    return bias


@operation
def fused_multi_row_padding(x: Tensor, out: Tensor, sizes: list[int], padded: list[int]) -> None:
    """Runs of rows of x at the beginnings of wider runs of out; zeros after them."""
    for source, target in zip(x.split(list(sizes)), out.split(list(padded)), strict=True):
        target[: len(source)] = source
        target[len(source) :] = 0


@operation
def fused_multi_row_unpadding(x: Tensor, out: Tensor, padded: list[int], sizes: list[int]) -> None:
    """The beginnings of runs of rows of x, one after another."""
    for source, target in zip(x.split(list(padded)), out.split(list(sizes)), strict=True):
        target.copy_(source[: len(target)])
