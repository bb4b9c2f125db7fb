"""Moments in and out of rules with a factor for each side of a block: SOAP, Shampoo, Kron.

Entries of a gradient are taken as independent with mean m and variance v − m², which is all that Adam knows of them:
E[G·Gᵀ] = m·mᵀ + diag(Σ_j var_ij), and the other side alike.
"""

import torch
from torch import Tensor

from megatron_opt.optimizers.base import MatrixInfo, State
from megatron_opt.optimizers.bases import rotate, rotate_squares
from megatron_opt.optimizers.blocks import as_matrix
from megatron_opt.optimizers.kron import Kron
from megatron_opt.optimizers.shampoo import Shampoo
from megatron_opt.optimizers.soap import Soap

_SEED = 1e-3  # of a factor, beside first gradients that count 1 − β
_FLOOR = 1e-7  # eigenvalues below this share of the largest are taken as that: the rule learns them later


def _factor(mean: Tensor, variance: Tensor, side: int) -> Tensor:
    """E[G·Gᵀ] (side 0) or E[GᵀG] (side 1) of blocks (B, b, c)."""
    outer = mean @ mean.mT if side == 0 else mean.mT @ mean
    return outer + torch.diag_embed(variance.sum(2 - side))


def _blocks(optimizer: Soap | Shampoo | Kron, info: MatrixInfo, m: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(mean, variance) of each region's blocks in fp64."""
    grid = optimizer.grid(info)
    mean, variance = as_matrix(m).double(), as_matrix((v - m.square()).clamp_min(0)).double()
    return list(zip(grid.cut(mean), grid.cut(variance), strict=True))


# SOAP


def fill_soap(optimizer: Soap, info: MatrixInfo, state: State, m: Tensor, v: Tensor) -> None:
    """Both moments, which the first gradient's bases will turn, and a little of the factors that Adam knows of: what the
    first gradients do not reach has an order then, and the same in every layout.
    """
    for region, (mean, variance) in enumerate(_blocks(optimizer, info, m, v)):
        for side in optimizer.sides(info):
            state[f"gg_{region}_{side}"].copy_(_SEED * _factor(mean, variance, side))
    state["exp_avg"].copy_(m)
    state["exp_avg_sq"].copy_(v)
    state["ready"].fill_(0.0 if optimizer.sides(info) else 1.0)


def soap_moments(optimizer: Soap, info: MatrixInfo, state: State) -> tuple[Tensor, Tensor]:
    """Both moments turned back from the eigenbasis, if they are in one."""
    if not state["ready"].any():
        return state["exp_avg"].float(), state["exp_avg_sq"].float()
    grid = optimizer.grid(info)
    blocks = [grid.cut(as_matrix(state[key].float())) for key in ("exp_avg", "exp_avg_sq")]
    regions = range(len(blocks[0]))
    bases = [{side: state[f"q_{region}_{side}"].float() for side in optimizer.sides(info)} for region in regions]
    first, second = (torch.empty_like(state[key], dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq"))
    grid.join([rotate(m, q, back=True) for m, q in zip(blocks[0], bases, strict=True)], as_matrix(first))
    grid.join([rotate_squares(v, q, back=True) for v, q in zip(blocks[1], bases, strict=True)], as_matrix(second))
    return first, second


# Shampoo


def fill_shampoo(optimizer: Shampoo, info: MatrixInfo, state: State, m: Tensor, v: Tensor) -> None:
    """Factors, the first moment and the grafted second one; the first step takes the factors' roots."""
    for region, (mean, variance) in enumerate(_blocks(optimizer, info, m, v)):
        for side in optimizer.sides(info):
            state[f"gg_{region}_{side}"].copy_(_factor(mean, variance, side))
    state["exp_avg"].copy_(m)
    if "graft_sq" in state:
        state["graft_sq"].copy_(v)


def shampoo_moments(optimizer: Shampoo, info: MatrixInfo, state: State) -> tuple[Tensor, Tensor]:
    """The first moment; the second is the grafted rule's, or L_ii·R_jj/tr(L) from the factors' diagonals."""
    m = state["exp_avg"].float()
    if "graft_sq" in state:
        return m, state["graft_sq"].float()
    grid, blocks = optimizer.grid(info), []
    for region, block in enumerate(grid.cut(as_matrix(m))):
        square = torch.ones_like(block)
        diagonals = {
            side: state[f"gg_{region}_{side}"].float().diagonal(dim1=1, dim2=2) for side in optimizer.sides(info)
        }
        for side, diagonal in diagonals.items():
            square = square * diagonal.unsqueeze(2 - side)
        total = square.sum((1, 2), keepdim=True).clamp_min(torch.finfo(m.dtype).tiny)
        norm = next(iter(diagonals.values())).sum(1).view(-1, 1, 1) if diagonals else total
        blocks.append(square * (norm / total))
    second = torch.empty_like(m)
    grid.join(blocks, as_matrix(second))
    return m, second


# Kron


def _root(factor: Tensor, power: float) -> Tensor:
    """A power of symmetric (B, k, k), its small eigenvalues raised to the floor."""
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(values.amax(-1, keepdim=True) * _FLOOR)
    return (vectors * (values**power).unsqueeze(-2)) @ vectors.mT


def fill_kron(optimizer: Kron, info: MatrixInfo, state: State, m: Tensor, v: Tensor) -> None:
    """Q₀, Q₁ that whiten the momentum: QᵀQ = L^(−1/2)·tr^(1/4), R^(−1/2)·tr^(1/4), L and R the momentum's E[M·Mᵀ].

    M has mean m and the share (1 − β)/(1 + β) of a gradient's variance. Gradients are divided by their norm first
    where the rule does so: by √Σv.
    """
    cfg, diagonal = optimizer.config, optimizer.diagonal(info)
    scale = v.double().sum().sqrt().clamp_min(torch.finfo(torch.float32).tiny) if cfg.normalize_grads else 1.0
    m, v = m.double() / scale, v.double() / scale**2
    noise = (1 - cfg.beta1) / (1 + cfg.beta1)
    for region, (mean, variance) in enumerate(_blocks(optimizer, info, m, v)):
        variance = variance * noise
        total = mean.square().sum((1, 2)) + variance.sum((1, 2))
        alive = total > 0
        for side, flat in enumerate(diagonal):
            q = state[f"q_{region}_{side}"]
            factor = _factor(mean, variance, side)
            gain = total.pow(0.25 if len(diagonal) == 2 else 0.0).view(-1, 1, 1)
            if flat:
                values = factor.diagonal(dim1=1, dim2=2)
                values = values.clamp_min(values.amax(-1, keepdim=True) * _FLOOR)
                factor_of_side = values.pow(-0.25) * gain.sqrt().squeeze(-1)
            elif cfg.update_form == "procrustes":
                factor_of_side = _root(factor, -0.25) * gain.sqrt()
            else:
                factor_of_side = torch.linalg.cholesky(_root(factor, -0.5) * gain, upper=True)
            q[alive] = factor_of_side[alive].to(q.dtype)
    state["exp_avg"].copy_(m)
