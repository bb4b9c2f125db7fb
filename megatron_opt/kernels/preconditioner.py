"""Kronecker preconditioners P = QᵀQ of blocks (B, m, n), learnt from pairs of gradient and noise, and matrix roots.

A factor is dense (B, k, k) or diagonal (B, k). PSGD: arXiv 1512.04202, 2402.11858. The triangular update and the norm's
bound are those of kron-torch and of the study's code; the Procrustes form is dQ = Q^½ E Q^{3/2} of 2402.11858.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.kernels import products
from megatron_opt.kernels.dispatch import Operation
from megatron_opt.kernels.projection import Shapes, stacked, two_sided

Tensors = Sequence[Tensor]
Factors = dict[int, Tensor]  # by side


def norm_bound(a: Tensor) -> Tensor:
    """A lower bound (B,) of ‖A‖₂, tight to √2 for symmetric and skew matrices: two products with its largest column."""
    largest = a.abs().amax((-2, -1), keepdim=True)
    scaled = a / largest.clamp_min(torch.finfo(a.dtype).tiny)
    index = scaled.square().sum(-2).argmax(-1)
    column = scaled.gather(-1, index.view(-1, 1, 1).expand(-1, a.shape[-2], 1))  # (B, k, 1)
    x = scaled.mT @ column
    x = scaled @ (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny))
    return largest.flatten() * torch.linalg.vector_norm(x, dim=(-2, -1))


def _times(x: Tensor, factor: Tensor, side: int, triangular: bool, transposed: bool = False) -> Tensor:
    """Q·x (side 0) or x·Qᵀ (side 1), with Qᵀ for Q where asked; `triangular`: Q is upper triangular."""
    if factor.ndim == 2:
        return x * (factor.unsqueeze(-1) if side == 0 else factor.unsqueeze(-2))
    q = factor.mT if transposed else factor
    shape = "full" if not triangular else "lower" if transposed == (side == 0) else "upper"
    return products.matmul(q, x, a_shape=shape) if side == 0 else products.matmul(x, q.mT, b_shape=shape)


def whiten(x: Tensor, factors: Factors, triangular: bool = False) -> Tensor:
    """Q₀·x·Q₁ᵀ; `triangular`: dense factors are upper triangular, which halves the work."""
    for side, factor in factors.items():
        x = _times(x, factor, side, triangular)
    return x


def precondition(x: Tensor, factors: Factors, triangular: bool = False) -> Tensor:
    """Q₀ᵀQ₀·x·Q₁ᵀQ₁. 4k² FLOPs a dense side and element of the other side, half of it where `triangular`."""
    for side, factor in factors.items():
        x = _times(_times(x, factor, side, triangular), factor, side, triangular, transposed=True)
    return x


def _unwhiten(v: Tensor, factors: Factors) -> Tensor:
    """Q₀⁻ᵀ·v·Q₁⁻¹ for upper triangular or diagonal factors."""
    for side, factor in factors.items():
        if factor.ndim == 2:
            v = v / (factor.unsqueeze(-1) if side == 0 else factor.unsqueeze(-2))
        elif side == 0:
            v = products.solve_lower(factor.mT, v)
        else:
            v = products.solve_lower(factor.mT, v.mT).mT
    return v


def _moment(x: Tensor, side: int, diagonal: bool) -> Tensor:
    """x·xᵀ (side 0) or xᵀx (side 1), or its diagonal."""
    if diagonal:
        return x.square().sum(2 - side)
    return products.matmul(x, x.mT, symmetric=True) if side == 0 else products.matmul(x.mT, x, symmetric=True)


def triangular_update(factors: Factors, g: Tensor, v: Tensor, lr: float | Tensor) -> None:
    """Q ← Q − lr·triu(AAᵀ − BBᵀ)·Q/‖AAᵀ + BBᵀ‖ for every side, A = Q₀gQ₁ᵀ, B = Q₀⁻ᵀvQ₁⁻¹, v Gaussian; in place.

    `lr` is a number, or one for each block (B,).
    """
    a, b = whiten(g, factors, triangular=True), _unwhiten(v, factors)
    for side, q in factors.items():
        diagonal = q.ndim == 2
        moment, wanted = _moment(a, side, diagonal), _moment(b, side, diagonal)
        tiny = torch.finfo(q.dtype).tiny
        if diagonal:
            rate = lr.view(-1, 1) if isinstance(lr, Tensor) else lr
            q.sub_((moment - wanted) * q * (rate / (moment + wanted).amax(-1, keepdim=True).clamp_min(tiny)))
        else:
            step = lr / norm_bound(moment + wanted).clamp_min(tiny)
            step_matrix = (moment - wanted).triu_().mul_(step.view(-1, 1, 1))
            q.sub_(products.matmul(step_matrix, q, a_shape="upper", b_shape="upper"))


def _kron_step(
    lefts: Tensors, rights: Tensors, moments: Tensors, noises: Tensors, dampings: Sequence[float], lr: float
) -> None:
    for i, moment in enumerate(moments):
        m, factors = stacked(moment), {0: stacked(lefts[i]), 1: stacked(rights[i])}
        if noises:
            v = stacked(noises[i])
            triangular_update(factors, torch.add(m, v, alpha=dampings[i]), v, lr)
        m.copy_(precondition(m, factors, triangular=True))


_kron = Operation(
    "kron_step",
    "(Tensor(a!)[] lefts, Tensor(b!)[] rights, Tensor(c!)[] moments, Tensor[] noises, float[] dampings, float lr) -> ()",
    _kron_step,
    lambda *arguments: None,
)


@register_flop_formula(torch.ops.megatron_opt.kron_step)
def _kron_flops(
    lefts: Shapes, rights: Shapes, moments: Shapes, noises: Shapes, *rest: object, **options: object
) -> int:
    """4mn(m + n); 6mn(m + n) + 2(m³ + n³) + 4(m² + n²) more where factors learn, triangles counted in full."""
    total = 2 * two_sided(moments, lefts, rights)
    if noises:
        total += 3 * two_sided(moments, lefts, rights)
        total += sum(math.prod(shape) * (2 * shape[-1] + 4) for shape in (*lefts, *rights))
    return total


def kron_step(
    lefts: Tensors, rights: Tensors, moments: Tensors, noises: Tensors, dampings: Sequence[float], lr: float
) -> None:
    """`triangular_update` of m + damping·v and v, then m ← Q₀ᵀQ₀·m·Q₁ᵀQ₁, for each of lists of (m, n) or (B, m, n).

    All in place, fp32 on CPU as `projection.taken` says; factors are upper triangular. Without noises and dampings
    factors stay as they are. Raises RuntimeError where shapes do not fit together.
    """
    _kron(moments[0].device, lefts, rights, moments, noises, dampings, lr)


def _rotate_to_symmetric(q: Tensor, largest_step: float = 0.125) -> Tensor:
    """One step exp(aR)·Q, R = Qᵀ − Q normalized, to second order, towards a symmetric positive Q."""
    r = q.mT - q
    r = r / norm_bound(r).clamp_min(torch.finfo(q.dtype).tiny).view(-1, 1, 1)
    rq = products.matmul(r, q)
    rrq = products.matmul(r, rq)
    slope, curve = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (rq, rrq))
    best = torch.where(curve < 0, -slope / curve, torch.full_like(slope, largest_step))
    step = best.clamp(0, largest_step).view(-1, 1, 1)
    return q + step * (rq + 0.5 * step * rrq)


def procrustes_update(factors: Factors, bounds: Factors, g: Tensor, lr: float, decay: float = 0.9) -> None:
    """Q ← Q − (lr/L)·(C − c·I)·Q, then a rotation towards symmetric Q; C the moment of P·g, c the other side's size.

    L is the running bound of ‖C‖ + c, kept in `bounds` (B,). In place, no solve.
    """
    whitened = precondition(g, factors)
    for side, q in factors.items():
        diagonal = q.ndim == 2
        moment = _moment(whitened, side, diagonal)
        other = float(g.shape[2 - side])
        norm = (moment.amax(-1) if diagonal else norm_bound(moment)) + other
        bound = bounds[side]
        bound.copy_(torch.maximum(decay * bound + (1 - decay) * norm, norm))
        if diagonal:
            q.mul_(1 - (lr / bound).unsqueeze(-1) * (moment - other))
        else:
            q.sub_((lr / bound).view(-1, 1, 1) * (products.matmul(moment, q) - other * q))
            q.copy_(_rotate_to_symmetric(q))


def balance(factors: Factors) -> None:
    """Give the two factors of each block the same largest entry, their product kept; in place."""
    if len(factors) < 2:
        return
    largest = [q.abs().flatten(1).amax(1) for q in factors.values()]
    mean = (largest[0] * largest[1]).sqrt()
    for q, most in zip(factors.values(), largest):
        q.mul_((mean / most).view(-1, *[1] * (q.ndim - 1)))


def inverse_root_eigh(a: Tensor, order: int, damping: float) -> Tensor:
    """(A + d·I)^(−1/p) of symmetric (B, k, k) by eigendecomposition, d = damping·largest eigenvalue; 0 stays 0."""
    values, vectors = torch.linalg.eigh(a)
    most = values.amax(-1, keepdim=True)
    damped = values.clamp_min(0) + damping * most
    roots = torch.where(most > 0, damped, torch.ones_like(damped)) ** (-1.0 / order)
    return (vectors * torch.where(most > 0, roots, torch.zeros_like(roots)).unsqueeze(-2)) @ vectors.mT


def inverse_root_newton(a: Tensor, order: int, damping: float, steps: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The same by the coupled Newton iteration (arXiv 2002.09018), products only: M → I, X → A^(−1/p).

    The damping is relative to the Frobenius norm; stops when all |M − I| are below the tolerance or grow.
    """
    size = a.shape[-1]
    eye = torch.eye(size, dtype=a.dtype, device=a.device)
    norm = torch.linalg.matrix_norm(a, keepdim=True)
    alive = norm > 0
    norm = torch.where(alive, norm, torch.ones_like(norm))
    damped = a + damping * norm * eye
    scale = (1 + order) / (2 * torch.linalg.matrix_norm(damped, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny))
    m, x = damped * scale, eye * scale ** (1.0 / order)
    error = (m - eye).abs().amax()
    for _ in range(steps):
        t = ((order + 1) * eye - m) / order
        new_m, new_x = torch.linalg.matrix_power(t, order) @ m, x @ t
        new_error = (new_m - eye).abs().amax()
        if not new_error < 1.2 * error:
            break
        m, x, error = new_m, new_x, new_error
        if error < tolerance:
            break
    return torch.where(alive, x, torch.zeros_like(x))
