"""Newton–Schulz on slices of one matrix: the products of one process, each computed once by one of the slices.

Slice j has columns X_j of wide X (k, K). X·Xᵀ is summed over the slices; of every (k, k) product a slice computes the
block of rows that is its own, in proportion to its columns. The iteration is the one of `kernels.orthogonalize`.
"""

import torch
from torch import Tensor

from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.kernels import products
from megatron_opt.kernels.orthogonalize import Coefficients
from megatron_opt.optimizers.slices import Leg, SliceStep


def legs(k: int, K: int, rows: tuple[int, ...], dtype: torch.dtype, table: Coefficients) -> list[Leg]:
    """Exchanges of `iterate` in order."""
    if not ns.uses_gram_form(k, K, dtype, table):
        step = [Leg(True, rows, k, dtype), Leg(False, rows, k, dtype), Leg(False, rows, k, dtype)]
        return step * len(table)
    wide, found = _wide(dtype), []
    for length in ns.segments(len(table), dtype):
        whole = Leg(False, rows, k, wide)
        found += [Leg(True, rows, k, wide), whole, *[whole] * (2 * length - 1), *[whole] * (length > 1)]
    return found


def iterate(x: Tensor, K: int, rows: tuple[int, ...], index: int, table: Coefficients) -> SliceStep:
    """Slice `index` (k, K_j) of the result for normalized X, in the dtype of X."""
    start, stop = rows[index], rows[index + 1]
    if not ns.uses_gram_form(len(x), K, x.dtype, table):
        for a, b, c in table:
            block = yield products.matmul(x, x.mT, symmetric=True)
            gram = yield block
            z = yield products.accumulate(block.clone(), block, gram, c, b)
            x = products.accumulate(x.clone(), z, x, 1.0, a)
        return x
    first = 0
    for length in ns.segments(len(table), x.dtype):
        wide = x.to(_wide(x.dtype))
        block = yield wide @ wide.mT
        gram = yield block
        q = block
        for number, (a, b, c) in enumerate(table[first : first + length]):
            z = torch.addmm(block, block, gram, beta=b, alpha=c)
            z[:, start:stop].diagonal().add_(a)
            whole = yield z
            q = q @ whole if number else z
            if number + 1 < length:  # polynomials of one matrix commute: own rows suffice
                block = block @ whole @ whole
                gram = yield block
        if length > 1:
            whole = yield q
        x = whole.to(x.dtype) @ x
        first += length
    return x


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the Gram form's (k, k)."""
    return dtype if dtype == torch.bfloat16 else torch.float64
