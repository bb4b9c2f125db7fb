"""Scales of FP8 from absolute maxima, and the cast under a scale. E4M3 has max 448, E5M2 57,344."""

import torch
from torch import Tensor

FORMATS = {7: (torch.float8_e4m3fn, 448.0), 8: (torch.float8_e5m2, 57344.0)}  # by DType
LARGEST = torch.finfo(torch.float32).max


def quotient(number: float, x: Tensor) -> Tensor:
    """number/x, rounded once; torch's own number / x is number·(1/x), rounded twice."""
    return torch.full_like(x, number) / x


def scale_from_amax(
    amax: Tensor, largest: float, powers_of_two: bool = False, epsilon: float = 0.0, overflowed: float = LARGEST
) -> Tensor:
    """largest/max(amax, ε) in fp32; 1 where amax is 0 or not finite, `overflowed` where the quotient overflows."""
    bounded = amax.clamp_min(epsilon)
    scale = quotient(largest, bounded).nan_to_num(posinf=overflowed)
    if powers_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where((bounded == 0) | ~bounded.isfinite(), torch.ones_like(scale), scale)


def e8m0(amax: Tensor, largest: float) -> Tensor:
    """amax/largest in fp32, rounded up to a power of two: its exponent + 127 in a byte; 254 for ∞, 255 for NaN, 0 below 2^−127."""
    value = amax.float() * torch.tensor(1.0 / largest, dtype=torch.float32)
    bits = value.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(value.isinf(), 254, exponent + up)
    return torch.where(value.isnan(), 255, exponent).to(torch.uint8)


def reciprocal(exponents: Tensor) -> Tensor:
    """2^(127 − byte) in fp32; NaN for 255."""
    bits = torch.where(exponents == 254, 0x00400000, (254 - exponents.int()) << 23)
    return torch.where(exponents == 255, 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)


def encode(x: Tensor, scale: Tensor, dtype: int) -> Tensor:
    """Bytes of x·scale, rounded to nearest even, saturated."""
    kind, largest = FORMATS[int(dtype)]
    return (x.float() * scale).clamp_(-largest, largest).to(kind).view(torch.uint8)


def _table(kind: torch.dtype) -> Tensor:
    return torch.arange(256).to(torch.uint8).view(kind).double()


_NUMBERS = {number: _table(kind) for number, (kind, _) in FORMATS.items()}
_EXPONENTS = torch.cat(
    [torch.ldexp(torch.ones(255, dtype=torch.float64), torch.arange(255) - 127), torch.tensor([torch.nan])]
)


def numbers(data: Tensor, dtype: int) -> Tensor:
    """What bytes stand for, fp64; by a table, several times as fast as torch's own conversion."""
    return _looked_up(_NUMBERS[int(dtype)], data)


def powers(exponents: Tensor) -> Tensor:
    """2^(byte − 127) in fp64; NaN for 255."""
    return _looked_up(_EXPONENTS, exponents)


def _looked_up(table: Tensor, data: Tensor) -> Tensor:
    return table.index_select(0, data.reshape(-1).int()).view(data.shape)
