"""Adam in an eigenbasis as one operation: into the basis, both moments, the quotient, and back."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.kernels import products
from megatron_opt.kernels.dispatch import Operation


def rotate(x: Tensor, left: Tensor | None, right: Tensor | None, back: bool = False) -> Tensor:
    """Q_Lᵀ x Q_R, or Q_L x Q_Rᵀ, of (B, m, n); a side without a basis stays."""
    if left is not None:
        x = products.matmul(left if back else left.mT, x)
    if right is not None:
        x = products.matmul(x, right.mT if back else right)
    return x


def _reference(
    grad: Tensor,
    moment: Tensor,
    second: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> Tensor:
    rotated = rotate(grad, left, right)
    moment.lerp_(rotated, 1 - beta1)
    second.mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
    return rotate(scale * moment / second.sqrt().add_(eps), left, right, back=True)


_project_adam = Operation(
    "project_adam",
    "(Tensor grad, Tensor(a!) moment, Tensor(b!) second, Tensor? left, Tensor? right, float beta1, float beta2, "
    "float eps, float scale) -> Tensor",
    _reference,
    lambda grad, *rest: grad.new_empty(grad.shape),
)


@register_flop_formula(torch.ops.megatron_opt.project_adam)
def _flops(
    grad: tuple[int, ...], moment: object, second: object, left: object, right: object, *rest: object, **o: object
):
    """4mn(m + n) for two bases."""
    batch, rows, columns = grad
    return 4 * batch * rows * columns * ((rows if left else 0) + (columns if right else 0))


def _rows(x: Tensor) -> bool:
    """Whether the native kernel takes (B, m, n): rows in order, each of them contiguous."""
    return (x.stride(2) == 1 or x.shape[2] <= 1) and (x.stride(1) >= x.shape[2] or x.shape[1] <= 1)


def project_adam(
    grad: Tensor,
    moment: Tensor,
    second: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> Tensor:
    """x = Q_Lᵀ g Q_R;  m ← EMA(x);  v ← EMA(x²);  returns Q_L [scale·m/(√v + ε)] Q_Rᵀ of (B, m, n). 4mn(m + n) FLOPs.

    Moments change in place; bases are (B, m, m) and (B, n, n), or None for a side that stays. SOAP: arXiv 2409.11321.
    Raises RuntimeError where shapes do not fit together.
    """
    arguments = (grad, moment, second, left, right, beta1, beta2, eps, scale)
    bases = [basis for basis in (left, right) if basis is not None]
    plain = all(map(_rows, (grad, moment, second))) and all(basis.is_contiguous() for basis in bases)
    if plain and products.available(grad) and all(x.dtype == grad.dtype for x in (moment, second, *bases)):
        return _project_adam(grad.device, *arguments)
    return _project_adam.reference(*arguments)
