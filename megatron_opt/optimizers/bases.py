"""Blocks and lists of them in their eigenbases: moments rotated in and out."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_opt.kernels import projection


def rotate(x: Tensor, bases: dict[int, Tensor], back: bool = False) -> Tensor:
    """Q_Lᵀ x Q_R, or Q_L x Q_Rᵀ; sides without a basis stay."""
    return projection.rotate(x, bases.get(0), bases.get(1), back)


def rotate_squares(v: Tensor, bases: dict[int, Tensor], back: bool = False) -> Tensor:
    """E[(Q_Lᵀ g Q_R)²] from E[g²] of independent entries of mean 0: the bases' squares on both sides."""
    return rotate(v, {side: basis.square() for side, basis in bases.items()}, back)


def rotate_moments(m: Tensor, v: Tensor, bases: dict[int, Tensor]) -> None:
    """Adam's moments of blocks (B, b, c) into their bases, in place: entries taken as independent, of variance v − m²."""
    variance = (v - m.square()).clamp_min(0)
    m.copy_(rotate(m, bases))
    v.copy_(rotate_squares(variance, bases) + m.square())


def both(by_side: Mapping[int, Sequence[Tensor]]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Lists of side 0 and of side 1, empty where it has none."""
    return by_side.get(0, ()), by_side.get(1, ())


def reorder(v: Tensor, order: Tensor, side: int) -> Tensor:
    """The second moment (B, b, c) follows the basis's columns (B, K)."""
    index = order.unsqueeze(-1) if side == 0 else order.unsqueeze(-2)
    return v.gather(side + 1, index.expand_as(v))


def follow(m: Tensor, v: Tensor, old: dict[int, Tensor], new: dict[int, Tensor], orders: Mapping[int, Tensor]) -> None:
    """Adam's moments (B, b, c) from old bases to new ones, in place; `orders` (B, K) are of the old bases' columns."""
    m.copy_(rotate(rotate(m, old, back=True), new))
    for side, order in orders.items():
        v.copy_(reorder(v, order, side))
