"""FP8 by one scale a tile: 1×128 and 128×128 (blockwise), 1×32 and 32×1 with E8M0 scales (MXFP8).

q = cast(clamp(x·s, ±max)), a value is q·(1/s). Blockwise: s = max/amax of the tile in fp32, rounded down to a power of two, kept as
1/s in fp32. MXFP8: 1/s = amax/max rounded up to a power of two, kept as its exponent + 127 in a byte. Columns have tiles of their
own: of the transposed matrix (blockwise, which keeps it transposed) or 32 rows high (MXFP8). Formulas: Transformer Engine's
common/recipe/recipe_common.cuh and common/cast/mxfp8/quantize_mxfp8.cuh.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opt.platform.transformer_engine.extension import operation
from megatron_opt.platform.transformer_engine.scales import (
    FORMATS,
    e8m0,
    encode,
    numbers,
    powers,
    reciprocal,
    scale_from_amax,
)

MX = 32
BLOCK = 128


def tiled(x: Tensor, rows: int, cols: int) -> Tensor:
    """x (m, k), filled up with zeros to whole tiles, as (m/rows, rows, k/cols, cols)."""
    m, k = x.shape
    if m % rows or k % cols:
        x = F.pad(x, (0, -k % cols, 0, -m % rows))
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // cols, cols)


def untiled(tiles: Tensor, m: int, k: int) -> Tensor:
    """The matrix (m, k) of tiles."""
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)[:m, :k]


def amaxes(tiles: Tensor) -> Tensor:
    """max |x| of every tile in fp32, (m/rows, k/cols); as on a GPU, which passes over NaN."""
    amax = tiles.abs().amax((1, 3)).float() if tiles.shape[1] > 1 else tiles[:, 0].float().abs().amax(-1)
    return tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax((1, 3)).float() if amax.isnan().any() else amax


def blockwise_scales(amax: Tensor, quantizer: Any, kind: torch.dtype) -> Tensor:
    """Scales of tiles with these maxima; where max/amax overflows, the largest number of x's type `kind`."""
    largest = FORMATS[int(quantizer.dtype)][1]
    overflowed = torch.finfo(kind).max
    return scale_from_amax(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon, overflowed)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _put(target: Tensor, part: Tensor) -> None:
    """Into the corner of a target that is filled up with zeros."""
    if target.shape != part.shape:
        target.zero_()
    target[: part.shape[0], : part.shape[1]] = part


def _ensure(out: Any, quantizer: Any, shape: Any) -> None:
    """Room for columns where they are wanted and `out` has none yet."""
    if quantizer.columnwise_usage and out._columnwise_data is None:
        room = quantizer.alloc_tensors(shape, device="cpu")
        out._columnwise_data, out._columnwise_scale_inv = room["_columnwise_data"], room["_columnwise_scale_inv"]


def write_blockwise(x: Tensor, quantizer: Any, out: Any) -> None:
    """Quantize x into a blockwise tensor: what there is room for of rows and of columns."""
    _ensure(out, quantizer, x.shape)
    matrix = _flat(x)
    square = quantizer.block_scaling_dim == 2
    rows = BLOCK if square else 1

    def cast(values: Tensor) -> tuple[Tensor, Tensor]:
        tiles = tiled(values, rows, BLOCK)
        scale = blockwise_scales(amaxes(tiles), quantizer, x.dtype)
        data = untiled(encode(tiles, scale[:, None, :, None], quantizer.dtype), *values.shape)
        return data, 1 / scale

    if square:
        data, inverse = cast(matrix)
        sides = {"rowwise": (data, inverse), "columnwise": (data.t(), inverse.t())}
    else:  # scales lie transposed, as cuBLAS reads them
        sides = {}
        for usage, values in (("rowwise", matrix), ("columnwise", matrix.t())):
            if getattr(out, f"_{usage}_data") is not None:
                data, inverse = cast(values)
                sides[usage] = (data, inverse.t())
    for usage, (data, inverse) in sides.items():
        target = getattr(out, f"_{usage}_data")
        if target is not None:
            target.copy_(data.reshape(target.shape))
            _put(getattr(out, f"_{usage}_scale_inv"), inverse)


def write_mx(x: Tensor, quantizer: Any, out: Any) -> None:
    """Quantize x into an MXFP8 tensor: what there is room for of rows and of columns."""
    assert not quantizer.with_2d_quantization, "MXFP8 with square blocks is not emulated"
    _ensure(out, quantizer, x.shape)
    matrix = _flat(x)
    largest = FORMATS[int(quantizer.dtype)][1]
    for usage, shape in (("rowwise", (1, MX)), ("columnwise", (MX, 1))):
        target = getattr(out, f"_{usage}_data")
        if target is None:
            continue
        tiles = tiled(matrix, *shape)
        exponents = e8m0(amaxes(tiles), largest)
        data = encode(tiles, reciprocal(exponents)[:, None, :, None], quantizer.dtype)
        target.copy_(untiled(data, *matrix.shape).reshape(target.shape))
        _put(getattr(out, f"_{usage}_scale_inv"), exponents)


def _scaled(data: Tensor, inverse: Tensor, rows: int, cols: int, dtype: Any) -> Tensor:
    """Bytes (m, k) times one factor a tile, in fp64."""
    m, k = data.shape
    values = numbers(data, dtype)
    factors = inverse[: -(-m // rows), : -(-k // cols)].double()
    if m % rows or k % cols:
        return values.mul_(factors.repeat_interleave(rows, 0)[:m].repeat_interleave(cols, 1)[:, :k])
    return untiled(tiled(values, rows, cols).mul_(factors[:, None, :, None]), m, k)


def decode_blockwise(tensor: Any, columnwise: bool) -> Tensor:
    """The matrix (m, k) that a blockwise tensor's rows or columns hold, fp64."""
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    inverse = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    codes = data.reshape(data.shape[0], -1) if columnwise else _flat(data)  # columns are kept transposed
    if tensor._is_2D_scaled:
        matrix = _scaled(codes, inverse, BLOCK, BLOCK, tensor._fp8_dtype)
    else:
        matrix = _scaled(codes, inverse.t()[: codes.shape[0]], 1, BLOCK, tensor._fp8_dtype)
    return matrix.t() if columnwise else matrix


def decode_mx(tensor: Any, columnwise: bool) -> Tensor:
    """The matrix (m, k) that an MXFP8 tensor's rows or columns hold, fp64."""
    data = tensor._columnwise_data if columnwise else tensor._rowwise_data
    exponents = tensor._columnwise_scale_inv if columnwise else tensor._rowwise_scale_inv
    return _scaled(_flat(data), powers(exponents), *((MX, 1) if columnwise else (1, MX)), tensor._fp8_dtype)


def _whole(shard: Tensor, h: int, w: int, start: int) -> Tensor:
    """A flat shard at its place among zeros, (h, w)."""
    full = torch.zeros(h * w, dtype=shard.dtype)
    full[start : start + shard.numel()] = shard.reshape(-1)
    return full.view(h, w)


@operation
def fp8_block_scaling_compute_partial_amax(shard: Tensor, amax: Tensor, h: int, w: int, start: int, block: int) -> None:
    """amax (h/128, w/128 and more) ← max |x| of each block's elements in a flat shard of (h, w)."""
    largest = amaxes(tiled(_whole(shard, h, w, start), block, block))
    amax[: largest.shape[0], : largest.shape[1]] = largest


@operation
def fp8_block_scaling_partial_cast(
    shard: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start: int, block: int, dtype: Any
) -> None:
    """Bytes of a flat shard of (h, w) under the scales of its blocks."""
    tiles = tiled(_whole(shard, h, w, start), block, block)
    data = encode(tiles, scale[: tiles.shape[0], None, : tiles.shape[2], None], dtype)
    out.copy_(untiled(data, h, w).reshape(-1)[start : start + shard.numel()].view(out.shape))
