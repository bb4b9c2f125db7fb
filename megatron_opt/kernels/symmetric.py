"""αA·Aᵀ + βD in bf16 on GPUs at half the FLOPs: only tiles on and below the diagonal are computed, then mirrored.

On compute capability 8 by our kernel (csrc/cuda/symmetric.cu), from 9 on by emerging-optimizers' Triton kernel where that
package is installed: it uses the matrix instructions that ours, made of `wmma`, does not reach there. It takes one matrix:
a batch of large ones goes through it one by one, where half of the work is worth a launch each.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.kernels.dispatch import Operation, native_available

_ONE_BY_ONE = 1024  # rows from which a matrix of a batch fills a GPU by itself (by its tiles' number, not measured)


def _reference(a: Tensor, d: Tensor | None, alpha: float, beta: float) -> Tensor:
    return alpha * (a @ a.mT) if d is None else torch.baddbmm(d, a, a.mT, beta=beta, alpha=alpha)


_symmetric_product = Operation(
    "symmetric_product",
    "(Tensor a, Tensor? d, float alpha, float beta) -> Tensor",
    _reference,
    lambda a, *rest: a.new_empty((*a.shape[:-1], a.shape[-2])),
)


@register_flop_formula(torch.ops.megatron_opt.symmetric_product)
def _flops(a: tuple[int, ...], *rest: object, **options: object) -> int:
    """2n²k, counted in full as for torch's products."""
    return 2 * a[0] * a[1] * a[1] * a[2]


@functools.cache
def _library() -> Callable[..., Tensor] | None:
    """emerging-optimizers' symmetric product of (n, k), or None."""
    try:
        from emerging_optimizers.triton_kernels import tsyrk_ex
    except ImportError:
        return None
    return tsyrk_ex


def form(dtype: torch.dtype, device: str, capability: int, shape: tuple[int, ...], native: bool, library: bool) -> str:
    """Which one takes a product of (…, n, k): `native`, `library` or `full` (torch's, all of it)."""
    if device != "cuda" or dtype != torch.bfloat16:
        return "full"
    if native and capability == 8:
        return "native"
    n, k = shape[-2:]
    if library and capability >= 9 and (len(shape) == 2 or n >= _ONE_BY_ONE) and n % 8 == 0 and k % 8 == 0:
        return "library"
    return "full"


def symmetric_product(a: Tensor, d: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """αA·Aᵀ + βD of (…, n, k) and symmetric (…, n, n). n²k FLOPs where half is computed, else 2n²k."""
    on_gpu = a.device.type == "cuda" and a.dtype == torch.bfloat16
    capability = torch.cuda.get_device_capability(a.device)[0] if on_gpu else 0
    native = on_gpu and native_available(a.device)
    chosen = form(a.dtype, a.device.type, capability, a.shape, native, on_gpu and _library() is not None)
    if chosen == "native":
        stacked = (a if a.ndim == 3 else a.unsqueeze(0)).contiguous()
        added = d if d is None or d.ndim == 3 else d.unsqueeze(0)
        out = _symmetric_product(a.device, stacked, None if added is None else added.contiguous(), alpha, beta)
        return out if a.ndim == 3 else out.squeeze(0)
    library = _library() if chosen == "library" else None
    if library is not None:
        if a.ndim == 2:
            return library(a.contiguous(), d, alpha, beta)
        each: list[Tensor | None] = [None] * len(a) if d is None else list(d)
        return torch.stack([library(one.contiguous(), other, alpha, beta) for one, other in zip(a, each, strict=True)])
    if d is None:
        return a @ a.mT if alpha == 1.0 else alpha * (a @ a.mT)
    return (torch.baddbmm if a.ndim == 3 else torch.addmm)(d, a, a.mT, beta=beta, alpha=alpha)
