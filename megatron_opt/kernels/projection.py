"""Adam in an eigenbasis as one operation: into the basis, both moments, the quotient, and back; and the bases' factors.

Operations take lists of matrices (m, n), or of stacks of equal blocks (B, m, n), and work on each where it lies.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.kernels import products
from megatron_opt.kernels.dispatch import Operation

Tensors = Sequence[Tensor]
Shapes = Sequence[Sequence[int]]  # what a formula of FLOPs gets in place of tensors


def rotate(x: Tensor, left: Tensor | None, right: Tensor | None, back: bool = False) -> Tensor:
    """Q_Lᵀ x Q_R, or Q_L x Q_Rᵀ, of (B, m, n); a side without a basis stays."""
    if left is not None:
        x = products.matmul(left if back else left.mT, x)
    if right is not None:
        x = products.matmul(x, right.mT if back else right)
    return x


def stacked(x: Tensor) -> Tensor:
    """A matrix as a stack of one."""
    return x if x.ndim == 3 else x.unsqueeze(0)


def _step(
    grads: Tensors, moments: Tensors, seconds: Tensors, lefts: Tensors, rights: Tensors, left_factors: Tensors,
    right_factors: Tensors, beta1: float, beta2: float, eps: float, scale: float, gain: float, decay: float, floor: float,
    squares: Tensors = (),
) -> None:  # fmt: skip
    _advance(left_factors, right_factors, grads, gain, decay)
    for i, (grad, moment, second) in enumerate(zip(grads, moments, seconds, strict=True)):
        left, right = (stacked(bases[i]) if bases else None for bases in (lefts, rights))
        rotated = rotate(stacked(grad), left, right)
        moment.lerp_(rotated.view_as(moment), 1 - beta1)
        rotated = rotated.view_as(second)
        second.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        root = stacked(second).sqrt()
        if floor:
            mean = squares[i] if squares else stacked(second).mean((-2, -1))
            root = torch.maximum(root, floor * mean.sqrt().to(root.dtype).view(-1, 1, 1))
        direction = scale * stacked(moment) / root.add_(eps)
        grad.copy_(rotate(direction, left, right, back=True).view_as(grad))


_project_adam = Operation(
    "project_adam",
    "(Tensor(a!)[] grads, Tensor(b!)[] moments, Tensor(c!)[] seconds, Tensor[] lefts, Tensor[] rights, "
    "Tensor(d!)[] left_factors, Tensor(e!)[] right_factors, float beta1, float beta2, float eps, float scale, "
    "float gain, float decay, float floor) -> ()",
    _step,
    lambda *arguments: None,
)


def _advance(lefts: Tensors, rights: Tensors, grads: Tensors, gain: float, decay: float) -> None:
    for i, grad in enumerate(map(stacked, grads)):
        for factors, g in ((lefts, grad), (rights, grad.mT)):
            if factors:
                stacked(factors[i]).baddbmm_(g, g.mT, beta=decay, alpha=gain)


_advance_factors = Operation(
    "advance_factors",
    "(Tensor(a!)[] lefts, Tensor(b!)[] rights, Tensor[] grads, float gain, float decay) -> ()",
    _advance,
    lambda *arguments: None,
)


def two_sided(grads: Sequence[Sequence[int]], lefts: Sequence[object], rights: Sequence[object]) -> int:
    """2mn(m + n) FLOPs for each block (…, m, n) of a list, a side of an empty list left out."""
    total = 0
    for shape in grads:
        total += 2 * math.prod(shape) * ((shape[-2] if lefts else 0) + (shape[-1] if rights else 0))
    return total


@register_flop_formula(torch.ops.megatron_opt.project_adam)
def _flops(
    grads: Shapes, moments: Shapes, seconds: Shapes, lefts: Shapes, rights: Shapes,
    left_factors: Shapes, right_factors: Shapes, *rest: object, **options: object,
) -> int:  # fmt: skip
    """4mn(m + n) for two bases, 2mn(m + n) for their factors."""
    return 2 * two_sided(grads, lefts, rights) + two_sided(grads, left_factors, right_factors)


@register_flop_formula(torch.ops.megatron_opt.advance_factors)
def _advance_flops(lefts: Shapes, rights: Shapes, grads: Shapes, *rest: object, **options: object) -> int:
    """2mn(m + n) for two factors, symmetric results counted in full."""
    return two_sided(grads, lefts, rights)


def _rows(x: Tensor) -> bool:
    """Whether native kernels take (…, m, n): rows in order, each of them contiguous."""
    if x.is_contiguous():
        return True
    rows, columns = x.shape[-2:]
    return (x.stride(-1) == 1 or columns <= 1) and (x.stride(-2) >= columns or rows <= 1)


def taken(moved: Tensors, whole: Tensors) -> bool:
    """Whether native kernels of lists take matrices that are read and written row by row, and contiguous ones."""
    if not (moved and products.available(moved[0])):
        return False
    types = {x.dtype for x in (*moved, *whole)}
    return types == {torch.float32} and all(map(_rows, moved)) and all(x.is_contiguous() for x in whole)


def project_adam(
    grads: Tensors, moments: Tensors, seconds: Tensors, lefts: Tensors, rights: Tensors, left_factors: Tensors = (),
    right_factors: Tensors = (), *, beta1: float, beta2: float, eps: float, scale: float, gain: float = 0.0,
    decay: float = 1.0, floor: float = 0.0, squares: Tensors = (), plain: bool | None = None,
) -> None:  # fmt: skip
    """x = Q_Lᵀ g Q_R;  m ← EMA(x);  v ← EMA(x²);  g ← Q_L [scale·m/(max(√v, f·√mean(v)) + ε)] Q_Rᵀ. 4mn(m + n) FLOPs.

    For each of lists of (m, n), or (B, m, n), all in place; bases are (m, m) and (n, n), or (B, …), and a list of them
    is empty where the side stays. f is `floor`, the mean each block's, or that of `squares` (blocks,) where the list has
    strips of larger blocks. Where there are factors, `advance_factors` comes first. `plain` is what `taken` says
    of the lists, where it is known. SOAP: arXiv 2409.11321. Raises RuntimeError where shapes do not fit together.
    """
    factors = (left_factors, right_factors)
    arguments = (grads, moments, seconds, lefts, rights, *factors, beta1, beta2, eps, scale, gain, decay, floor)
    if plain is None:
        plain = taken([*grads, *moments, *seconds], [*lefts, *rights, *factors[0], *factors[1]])
    if plain and not (floor and squares):
        _project_adam(grads[0].device, *arguments)
    else:
        _step(*arguments, squares)


def advance_factors(lefts: Tensors, rights: Tensors, grads: Tensors, gain: float, decay: float) -> None:
    """L ← decay·L + gain·g·gᵀ, R ← decay·R + gain·gᵀ·g in place, for each of lists as `project_adam`'s. 2mn(m + n) FLOPs."""
    if taken(grads, [*lefts, *rights]):
        _advance_factors(grads[0].device, lefts, rights, grads, gain, decay)
    else:
        _advance(lefts, rights, grads, gain, decay)
