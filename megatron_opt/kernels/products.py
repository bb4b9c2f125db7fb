"""Matrix products on CPU: fp32 at the processor's full width, symmetric results and triangular operands at half
the work, triangular solves, Newton–Schulz in cache.

torch's fp32 products go through a library that takes the narrow path on some processors; ours reach 2 to 4
times its rate there (docs/kernels.md). Where ours do not apply (other devices, types, processors), torch's
own are used.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.kernels import dispatch
from megatron_opt.kernels.dispatch import Operation


@functools.cache
def _processor(attribute: str) -> bool:
    module, _ = dispatch._load()
    return bool(getattr(module, attribute, False))


def available(tensor: Tensor, attribute: str = "products") -> bool:
    """Whether native products take this tensor; `bf16_products` for iterations in bf16."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and dispatch.native_available(tensor.device)
        and _processor(attribute)
    )


def _taken(a: Tensor, b: Tensor) -> bool:
    """Whether a·b runs natively: row-major or transposed operands, no broadcasting."""
    plain = a.ndim in (2, 3) and 1 in a.stride()[-2:] and 1 in b.stride()[-2:]
    return plain and available(a) and b.dtype == a.dtype and a.shape[:-2] == b.shape[:-2]


_TRIANGLES = ("full", "lower", "upper")


def _product_reference(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: float,
    beta: float,
    symmetric: bool,
    a_shape: int = 0,
    b_shape: int = 0,
) -> None:
    value = alpha * (a @ b)
    out.copy_(value if beta == 0 else value.add_(out, alpha=beta))


def _orthogonalize_reference(
    matrices: Sequence[Tensor], steps: Sequence[float], eps: float, add_eps: bool, bf16: bool, gram: int
) -> list[Tensor]:
    results = []
    for matrix in matrices:
        norm = torch.linalg.vector_norm(matrix)
        x = matrix / (norm + eps if add_eps else norm.clamp_min(eps))
        x = (x.mT if x.shape[0] > x.shape[1] else x).to(torch.bfloat16 if bf16 else x.dtype)
        for a, b, c in zip(steps[::3], steps[1::3], steps[2::3], strict=True):
            r = x @ x.mT
            x = torch.addmm(x, torch.addmm(r, r, r, beta=b, alpha=c), x, beta=a)
        x = x.to(matrix.dtype)
        results.append((x.mT if matrix.shape[0] > matrix.shape[1] else x).contiguous())
    return results


_product = Operation(
    "product",
    "(Tensor(a!) out, Tensor a, Tensor b, float alpha, float beta, bool symmetric, int a_shape=0, int b_shape=0) -> ()",
    _product_reference,
    lambda *arguments: None,
)
_orthogonalize = Operation(
    "orthogonalize",
    "(Tensor[] matrices, float[] steps, float eps, bool add_eps, bool bf16, int gram) -> Tensor[]",
    _orthogonalize_reference,
    lambda matrices, *rest: [torch.empty_like(m) for m in matrices],
)


_solve_lower = Operation(
    "solve_lower",
    "(Tensor l, Tensor x) -> Tensor",
    lambda l, x: torch.linalg.solve_triangular(l, x, upper=False),
    lambda l, x: x.new_empty(x.shape),
)


@register_flop_formula(torch.ops.megatron_opt.product)
def _product_flops(out: Sequence[int], a: Sequence[int], *rest: object, **options: object) -> int:
    """2mnk, symmetric results and triangular operands counted in full as for torch's products."""
    return 2 * math.prod(out) * a[-1]


def accumulate(
    out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, beta: float = 0.0, *, symmetric: bool = False
) -> Tensor:
    """out ← alpha·a·b + beta·out in place, (m, n) or a batch of them; `symmetric` promises a symmetric
    result.
    """
    if _taken(a, b) and out.is_contiguous() and out.dtype == a.dtype:
        _product(out.device, out, a, b, alpha, beta, symmetric)
        return out
    if out.ndim == 3:
        return out.baddbmm_(a, b, beta=beta, alpha=alpha)
    return out.addmm_(a, b, beta=beta, alpha=alpha)


def matmul(a: Tensor, b: Tensor, *, symmetric: bool = False, a_shape: str = "full", b_shape: str = "full") -> Tensor:
    """a·b for (m, k)·(k, n) or batches of them, at half the work where something is known of it.

    `symmetric` promises a symmetric result, `a_shape` and `b_shape` (`lower` or `upper`) zeros in a square operand: they
    are passed over, whatever they meet.
    """
    if _taken(a, b):
        out = a.new_empty((*a.shape[:-1], b.shape[-1]))
        shapes = (_TRIANGLES.index(a_shape), _TRIANGLES.index(b_shape))
        _product(a.device, out, a, b, 1.0, 0.0, symmetric, *shapes)
        return out
    return a @ b


def solve_lower(l: Tensor, x: Tensor) -> Tensor:
    """L⁻¹·x for lower triangular (B, k, k) and (B, k, n); what lies above L's diagonal is not read. k²n FLOPs."""
    plain = l.ndim == 3 and 1 in l.stride()[-2:] and 1 in x.stride()[-2:]
    if plain and available(l) and x.dtype == l.dtype and l.shape[0] == x.shape[0]:
        return _solve_lower(l.device, l, x)
    return _solve_lower.reference(l, x)


def orthogonalize(
    matrices: Sequence[Tensor],
    steps: Sequence[tuple[float, float, float]],
    eps: float,
    *,
    add_eps: bool = True,
    bf16: bool = True,
    gram: int = 1,
) -> list[Tensor]:
    """Newton–Schulz on fp32 matrices of any shapes: X/(‖X‖ + ε), then X ← aX + bXXᵀX + c(XXᵀ)²X for each (a,
    b, c).

    `gram` steps at a time run on the Gram matrix and are applied once: cheaper for long matrices, less exact
    in bf16.
    """
    flat = [number for step in steps for number in step]
    return _orthogonalize(matrices[0].device, list(matrices), flat, eps, add_eps, bf16, gram) if matrices else []
