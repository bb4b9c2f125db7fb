"""Weights as a function of (seed, global parameter name, row, column), so that every layout starts from the same model.

An element's random bits are splitmix64 of a key hashed from seed and name and of the element's index in the whole
matrix; its value is the inverse cumulative normal distribution of them. No generator is advanced, so any shard can be
filled alone.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opt.layout.kinds import find_kind
from megatron_opt.layout.matrices import declare
from megatron_opt.layout.quantized import is_quantized, set_initial_values
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.mup import init_multiplier
from megatron_opt.training.width import width_ratio

_CHUNK = 1 << 20
_TRUNCATION = 3.0  # sigmas, arXiv 2509.02046's code


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic


def uniform(seed: int, name: str, index: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, for the int64 element indices of a named tensor (splitmix64)."""
    key = _signed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little"))
    x = index * _GOLDEN + key
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    x = x ^ _shift_right(x, 31)
    return (_shift_right(x, 12).double() + 0.5) * 2.0**-52


def normal(seed: int, name: str, index: Tensor, truncate: float | None = None) -> Tensor:
    """Standard normal numbers, cut at ±`truncate` sigmas (not rescaled), float64."""
    u = uniform(seed, name, index)
    if truncate is not None:
        low = 0.5 * (1 + math.erf(-truncate / math.sqrt(2)))
        u = low + u * (1 - 2 * low)
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


def scale_of(info: MatrixInfo, style: str, config: Any) -> float:
    """Standard deviation of a weight: Megatron's, or the study's 1/√fan_in and, for the embedding, 1/hidden.

    Under µP it is that of the base width, times `mup.init_multiplier`.
    """
    ratio = width_ratio(config)
    fan_in, factor = info.shape[-1] / ratio, init_multiplier(info, ratio)
    if style == "study":
        return factor / fan_in if info.kind == "embedding" else factor / math.sqrt(fan_in)
    std = float(config.init_method_std) * factor
    if info.role in ("attention_output", "down", "ssm_output"):  # they write to the residual stream
        each = 1.0 if getattr(config, "is_hybrid_model", False) else 2.0  # times a layer, as Megatron counts
        return std / math.sqrt(each * config.num_layers)
    return std


def ssm_values(role: str, u: Tensor) -> Tensor:
    """Mamba 2's vectors from uniform numbers in (0, 1), as Megatron's MambaMixer distributes them.

    A from 1 to 16; steps softplus(dt_bias) from 1e-3 to 1e-1, even in their logarithm; the convolution of 4 taps within
    ±1/√4; D is 1.
    """
    if role == "A_log":
        return torch.log(1 + 15 * u)
    if role == "D":
        return torch.ones_like(u)
    if role == "dt_bias":
        dt = torch.exp(u * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))
    return (2 * u - 1) / math.sqrt(4)


def _fill(
    target: Tensor, seed: int, name: str, row: int, col: int, width: int, std: float, truncate: float | None
) -> None:
    """Fill a local block whose upper left corner is (row, col) of a whole matrix of `width` columns."""
    rows, cols = target.shape
    step = max(1, _CHUNK // cols)
    columns = torch.arange(cols, dtype=torch.int64) + col
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        index = (torch.arange(start, stop, dtype=torch.int64) + row)[:, None] * width + columns[None]
        target[start:stop] = (normal(seed, name, index, truncate) * std).to(target)


@torch.no_grad()
def initialize(chunks: Sequence[Any], config: Any, seed: int, style: str) -> None:
    """Fill all trainable parameters of this rank's model chunks in place.

    Weights: N(0, std²) or its truncated form by `style` ("megatron" or "study"); norms 1; biases 0; Mamba's vectors as
    Megatron's.
    """
    declaration = declare(chunks, config)
    truncate = _TRUNCATION if style == "study" else None
    for view in declaration.views:
        kind = find_kind(view.name)
        assert kind is not None  # `declare` has refused it
        if kind.kind in ("norm", "bias"):
            one = kind.kind == "norm" and view.name.endswith("weight")
            one = one and not getattr(config, "layernorm_zero_centered_gamma", False)
            view.param.fill_(1.0 if one else 0.0)
            continue
        quantized = is_quantized(view.param)
        values = torch.empty(view.param.shape, dtype=view.param.dtype) if quantized else view.param
        local = values.view(view.rows, view.cols)
        for mapping in view.mappings:
            info = declaration.matrices[mapping.matrix]
            block = local[mapping.local_row : mapping.local_row + mapping.rows]
            if kind.kind == "ssm":
                index = torch.arange(mapping.rows, dtype=torch.int64) + mapping.row
                block.copy_(ssm_values(kind.role, uniform(seed, info.name, index))[:, None])
                continue
            _fill(
                block,
                seed,
                info.name,
                mapping.row,
                mapping.col,
                info.shape[-1],
                scale_of(info, style, config),
                truncate,
            )
        if quantized:
            set_initial_values(view.param, values)
