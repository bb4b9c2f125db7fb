"""FP8 tensors of every recipe, and FP8 by one scale a tensor: from the tensor itself (tensorwise), or from a history (delayed).

q = cast(clamp(x·s, ±max)), s = max/amax; a value is q/s. One scale a tile: blocks.py.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_opt.platform.transformer_engine import blocks
from megatron_opt.platform.transformer_engine.extension import MODULE, operation, torch_dtype
from megatron_opt.platform.transformer_engine.scales import FORMATS, LARGEST, encode, numbers, quotient, scale_from_amax


def decode(tensor: Any) -> tuple[Tensor, Tensor]:
    """(values before the scale, as stored in rows, fp64; 1/scale) of a tensor with one scale."""
    if tensor._data is not None:
        raw = tensor._data.reshape(-1, tensor._data.shape[-1])
    else:
        raw = tensor._transpose.reshape(tensor._transpose.shape[0], -1).t().contiguous()
    return numbers(raw, tensor._fp8_dtype), tensor._scale_inv


def _largest(x: Tensor) -> Tensor:
    """max |x| in fp32, NaN where one is; 0 of nothing."""
    if not x.numel():
        return torch.zeros(())
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high).float()


def _is_current(quantizer: Any) -> bool:
    return type(quantizer).__name__ == "Float8CurrentScalingQuantizer"


def _write_one_scale(x: Tensor, quantizer: Any, out: Any) -> None:
    """Quantize x by one scale into a tensor's rows, and its columns where they are there or wanted."""
    amax = _largest(x)
    if _is_current(quantizer):
        if quantizer.with_amax_reduction:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        largest = FORMATS[int(quantizer.dtype)][1]
        scale = scale_from_amax(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    else:
        scale = quantizer.scale.reshape(())
        if quantizer.amax.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, amax.view(quantizer.amax.shape)))
    data = encode(x, scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None or quantizer.columnwise_usage:
        transposed = data.reshape(-1, data.shape[-1]).t().contiguous()
        if out._transpose is None:
            out._transpose = transposed
        else:
            out._transpose.copy_(transposed.view(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_((1 / scale).view(out._scale_inv.shape))


WRITERS = {
    "Float8Quantizer": _write_one_scale,
    "Float8CurrentScalingQuantizer": _write_one_scale,
    "Float8BlockQuantizer": blocks.write_blockwise,
    "MXFP8Quantizer": blocks.write_mx,
}


def _writer(quantizer: Any) -> Any:
    kind = type(quantizer).__name__
    return WRITERS[kind] if kind in WRITERS else getattr(MODULE, kind)()  # raises: it is not answered for


@operation
def quantize(x: Tensor, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """x in the quantizer's format, into `out` where it is given; unchanged where `noop` holds another number than 0."""
    if noop is not None and float(noop) != 0:
        return out
    write = _writer(quantizer)
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)
    write(x.detach(), quantizer, out)
    out._fp8_dtype = quantizer.dtype
    return out


@operation
def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """q/s in `dtype`."""
    if hasattr(tensor, "_rowwise_data"):  # blockwise tensors do it themselves
        matrix = blocks.decode_mx(tensor, columnwise=tensor._rowwise_data is None)
        return matrix.to(torch_dtype(dtype, torch.float32)).reshape(tensor.size())
    values, inverse = decode(tensor)
    return (values.float() * inverse).to(torch_dtype(dtype, torch.float32)).reshape(tensor.size())


@operation
def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin: bool = False
) -> Any:
    """A tensor to quantize into: bytes and scales of rows, and of columns, as they are wanted."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    shape = tuple(shape)
    if _writer(quantizer) is not _write_one_scale:
        return _empty_blocks(quantizer, shape, dtype)
    parts = {
        "data": torch.zeros(shape, dtype=torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": torch.zeros((shape[-1], *shape[:-1]), dtype=torch.uint8)
        if quantizer.columnwise_usage
        else None,
        "fp8_scale_inv": torch.ones(1),
        "fp8_dtype": quantizer.dtype,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **parts)
    return Float8Tensor(shape=shape, dtype=dtype, requires_grad=False, device=torch.device("cpu"), **parts)


def _empty_blocks(quantizer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A tensor with one scale a tile, as Transformer Engine's Python describes it; scales lie as they are read, never swizzled."""
    described = quantizer.storage_metadata(dtype)
    parts: dict[str, Any] = {
        f"{usage}_{what}": None for usage in ("rowwise", "columnwise") for what in ("data", "scale_inv")
    }
    parts |= {name[1:]: tensor for name, tensor in quantizer.alloc_tensors(shape, device="cpu").items()}
    parts |= described["nontensor_kwargs"]
    if "with_gemm_swizzled_scales" in parts:
        parts["with_gemm_swizzled_scales"] = False
    if not quantizer.internal:
        parts |= {"shape": shape, "dtype": dtype, "requires_grad": False, "device": torch.device("cpu")}
    return described["cls"](**parts)


@operation
def split_quantize(x: Tensor, sizes: Any, quantizers: Any, **options: Any) -> list[Any]:
    """Rows cut into runs of `sizes`, each by its own quantizer."""
    return [quantize(part, quantizer) for part, quantizer in zip(x.split(list(sizes)), quantizers, strict=True)]


@operation
def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """(sum over rows, the gradient in FP8)."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


@operation
def fp8_transpose(data: Tensor, dtype: Any, out: Tensor | None = None) -> Tensor:
    """Bytes of the transposed matrix."""
    transposed = data.reshape(-1, data.shape[-1]).t().contiguous()
    if out is None:
        return transposed
    out.copy_(transposed.view(out.shape))
    return out


@operation
def swap_first_dims(x: Tensor, out: Tensor | None = None) -> Tensor:
    """(a, b, …) → (b, a, …), contiguous."""
    swapped = x.transpose(0, 1).contiguous()
    if out is None:
        return swapped
    out.copy_(swapped)
    return out


@operation
def compute_amax(x: Tensor, amax: Tensor) -> None:
    """amax ← max |x|."""
    amax.copy_(_largest(x).view(1))


@operation
def multi_tensor_scale(chunk: int, overflow: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    """b ← a·scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


@operation
def multi_tensor_compute_scale_and_scale_inv(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], largest: float, powers_of_two: bool, epsilon: float
) -> None:
    """Scales and their inverses from absolute maxima."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_from_amax(amax, largest, powers_of_two, epsilon).view(scale.shape))
        inverse.copy_((1 / scale).view(inverse.shape))


@operation
def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Delayed scaling: the step's maxima enter each history (length, n), s = max/2^margin/amax over it, the history rolls."""
    at = 0
    for history, scale in zip(histories, scales, strict=True):
        history[0].copy_(reduced[at : at + history.shape[1]])
        at += history.shape[1]
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        updated = (quotient(FORMATS[int(dtype)][1], amax) / 2**margin).nan_to_num(posinf=LARGEST)
        scale.copy_(torch.where(amax.isfinite() & (amax > 0), updated, scale))
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
