"""Newton–Schulz on shards of one matrix: the products of one process, each computed once by one of the shards.

Shard j has columns X_j of wide X (k, K). X·Xᵀ is summed over the shards; of every (k, k) product a shard computes the
block of rows that is its own, in proportion to its columns. All of them are symmetric, polynomials of one matrix: half of
each row travels. The iteration is the one of `kernels.orthogonalize`.
"""

import functools

import torch
from torch import Tensor

from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.kernels import products
from megatron_opt.kernels.host import on_device
from megatron_opt.kernels.orthogonalize import Coefficients
from megatron_opt.optimizers.partition import Collective, ShardStep, all_gather, reduce_scatter


def collectives(k: int, K: int, rows: tuple[int, ...], dtype: torch.dtype, table: Coefficients) -> list[Collective]:
    """Exchanges of `iterate` in order."""
    if not ns.uses_gram_form(k, K, dtype, table):
        gathered = all_gather(rows, _half(k), dtype)
        return [reduce_scatter(rows, _half(k), dtype), gathered, gathered] * len(table)
    planned = []
    for length in ns.segments(len(table), dtype):
        gathered = all_gather(rows, _half(k), _wide(dtype))
        planned += [reduce_scatter(rows, _half(k), _wide(dtype)), *[gathered] * (2 * length + (length > 2))]
    return planned


def iterate(x: Tensor, K: int, rows: tuple[int, ...], index: int, table: Coefficients) -> ShardStep:
    """Shard `index` (k, K_j) of the result for normalized X, in the dtype of X."""
    start, stop = rows[index], rows[index + 1]
    table = ns.safe(table, x.dtype)
    if not ns.uses_gram_form(len(x), K, x.dtype, table):
        for a, b, c in table:
            block = yield fold(products.matmul(x, x.mT, symmetric=True))
            gram = unfold((yield block))
            block = gram[start:stop]
            z = unfold((yield fold(products.accumulate(block.clone(), block, gram, c, b), start)))
            x = products.accumulate(x.clone(), z, x, 1.0, a)
        return x
    first = 0
    for length in ns.segments(len(table), x.dtype):
        wide = x.to(_wide(x.dtype))
        block = yield fold(wide @ wide.mT)
        gram = unfold((yield block))
        whole, q = gram, gram[start:stop]
        block = q
        for number, (a, b, c) in enumerate(table[first : first + length]):
            z = torch.addmm(block, block, gram, beta=b, alpha=c)
            z[:, start:stop].diagonal().add_(a)
            if number + 1 == length <= 2:  # the other factor is here whole, and polynomials of one matrix commute
                q = z @ whole if number else z
                break
            whole = unfold((yield fold(z, start)))
            q = q @ whole if number else z
            if number + 1 < length:  # for the same reason own rows suffice
                block = block @ whole @ whole
                gram = unfold((yield fold(block, start)))
        whole = unfold((yield fold(q, start)))
        x = whole.to(x.dtype) @ x
        first += length
    return x


def _half(k: int) -> int:
    """Elements that travel of a row."""
    return k // 2 + 1


def fold(rows: Tensor, first: int = 0) -> Tensor:
    """Of rows `first`, … of a symmetric (k, k), row r's columns r to r + k/2, beyond the last going on from column 0."""
    k, half = rows.shape[1], _half(rows.shape[1])
    twice = torch.cat([rows, rows[:, :half]], dim=1)
    return twice.as_strided((len(rows), half), (k + half + 1, 1), first).contiguous()


def unfold(folded: Tensor) -> Tensor:
    """The symmetric (k, k) of all folded rows (k, k/2 + 1); what both of two rows have counts half from each."""
    k, half = folded.shape
    twice = folded.new_zeros(k, k + half)
    torch.mul(folded, _shares(k, folded.dtype, folded.device), out=twice.as_strided((k, half), (k + half + 1, 1)))
    upper = twice[:, :k]
    upper[:, :half] += twice[:, k:]
    return upper + upper.mT


@functools.cache
def _shares(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What of each element of a folded row counts: half of those that two rows have."""
    shares = torch.ones(_half(k), dtype=dtype)
    shares[0] = 0.5
    if k % 2 == 0:
        shares[-1] = 0.5
    return on_device(shares, device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the Gram form's (k, k)."""
    return dtype if dtype == torch.bfloat16 else torch.float64
