"""8-bit optimizer state in blocks of 2048 values that share one absolute maximum (csrc/include/codes.h in
torch).

Signed codes are linear (8-bit Muon, arXiv 2509.23106); unsigned codes have 5 exponent and 3 mantissa bits.
"""

import torch
from torch import Tensor

BLOCK = 2048
_BIAS = (127 - 31) << 3


def blocks(numel: int) -> int:
    """Number of blocks, so of absolute maxima, of `numel` values."""
    return -(-numel // BLOCK)


def _blockwise(values: Tensor, numel: int) -> Tensor:
    """One value a block (blocks,) → one value an element (numel,)."""
    return values.repeat_interleave(BLOCK)[:numel]


def block_absmax(x: Tensor) -> Tensor:
    """Absolute maximum of each block, (blocks,) fp32; NaN for a block with an Inf or NaN."""
    flat = x.detach().reshape(-1).float().abs()
    padded = torch.nn.functional.pad(flat, (0, blocks(flat.numel()) * BLOCK - flat.numel())).view(-1, BLOCK)
    return torch.where(padded.isfinite().all(1), padded.amax(1), float("nan"))


def _ratios(x: Tensor, absmax: Tensor) -> Tensor:
    inverse = torch.where(absmax > 0, 1.0 / absmax, torch.zeros_like(absmax))
    return x.reshape(-1).float() * _blockwise(inverse, x.numel())


def encode_signed(x: Tensor, absmax: Tensor, draws: Tensor | None = None) -> Tensor:
    """int8 codes round(127·x/absmax); with 32-bit `draws`, stochastically."""
    shift = 0.5 if draws is None else (draws >> 8).float() * 2.0**-24
    codes = torch.floor(_ratios(x, absmax) * 127.0 + shift).nan_to_num(nan=-127.0).clamp(-127, 127)
    return codes.to(torch.int8).view(x.shape)


def decode_signed(codes: Tensor, absmax: Tensor) -> Tensor:
    """fp32 values of int8 codes."""
    step = _blockwise(absmax * (1.0 / 127.0), codes.numel())
    return (codes.reshape(-1).float() * step).view(codes.shape)


def encode_unsigned(x: Tensor, absmax: Tensor, draws: Tensor) -> Tensor:
    """uint8 codes of x ≥ 0, rounded stochastically by 32-bit `draws`; only zero has code 0."""
    bits = _ratios(x, absmax).clamp(max=1.0).view(torch.int32).long()
    codes = (((bits + (draws >> 12)) >> 20) - _BIAS).clamp(1, 248)
    return torch.where(x.reshape(-1) > 0, codes, 0).to(torch.uint8).view(x.shape)


def decode_unsigned(codes: Tensor, absmax: Tensor) -> Tensor:
    """fp32 values of uint8 codes."""
    flat = codes.reshape(-1)
    ratios = ((flat.int() + _BIAS) << 20).view(torch.float32)
    values = ratios * _blockwise(absmax, flat.numel())
    return torch.where(flat == 0, torch.zeros_like(values), values).view(codes.shape)


def decode(codes: Tensor, absmax: Tensor) -> Tensor:
    """fp32 values of a quantized state of either kind."""
    return decode_signed(codes, absmax) if codes.dtype == torch.int8 else decode_unsigned(codes, absmax)
