"""Dion: momentum approximated by a low rank, orthonormalized, the rest kept for later steps. arXiv 2504.05295 (algorithm 1).

One power iteration a step from the last step's right factor, so that the factors follow the momentum's singular vectors. What a
direction with hardly any momentum in it would become is rounding noise of length 1: it is left out, and its right factor kept.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import Cost, MatrixInfo, Scalars, State, StateKind, StateSpec
from megatron_opt.optimizers.muon import SCALE_MODES, Muon, shape_scale
from megatron_opt.optimizers.narrow import NarrowOptimizer, moment_option
from megatron_opt.optimizers.options import check, choice, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True)
class DionConfig:
    """Hyperparameters of Dion; the paper's."""

    momentum: float = decay(0.95, "share μ of the approximated momentum that stays")
    rank_fraction: float = option(0.25, "rank over the shorter side", above=0, high=1)
    eps: float = epsilon(1e-8, "added to the norms of the right factor's columns")
    floor: float = option(
        1e-5, "columns that hold less than this share of the momentum's norm make no step; 0: the paper's rule",
        low=0, high=0.1,
    )  # fmt: skip
    scale_mode: str = choice("unit_rms_norm", SCALE_MODES, "factor by the matrix's shape (out, in)")
    extra_scale_factor: float = option(1.0, "further factor on the update", above=0, high=1e6)

    moment_dtype: str = moment_option()

    def __post_init__(self) -> None:
        check(self)


@register
class Dion(NarrowOptimizer):
    """B = M + G;  P = qr(B Q);  R = BᵀP;  M ← B − (1−μ)·P Rᵀ;  Q ← R/(‖R_j‖ + ε);  u = √(out/in)·P Qᵀ, rank r."""

    name: ClassVar[str] = "dion"
    Config: ClassVar[type] = DionConfig
    scalars: ClassVar[Scalars] = Muon.scalars  # steps are Muon's; the paper's ratio is 1

    def rank(self, info: MatrixInfo) -> int:
        """r, from 1 to the shorter side."""
        return max(1, round(self.config.rank_fraction * min(info.shape)))

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        if len(info.shape) != 2:
            raise UserError(
                f"{self.name} needs matrices, {info.name} has shape {info.shape}; route it to another optimizer."
            )
        generator = torch.Generator().manual_seed(zlib.crc32(info.name.encode()))  # alike on every layout and device
        right = torch.randn(info.shape[1], self.rank(info), generator=generator)
        return self.moments(weight, ("momentum_buffer",)) | {"right_factor": right.to(weight)}

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        return self.moments_spec(("momentum_buffer",)) | {"right_factor": StateKind.SHARED}

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        return [self._direction(grad, state, info) for grad, state, info in zip(grads, states, infos)]

    def _direction(self, grad: Tensor, state: State, info: MatrixInfo) -> Tensor:
        cfg, right = self.config, state["right_factor"]
        momentum = state["momentum_buffer"].add_(grad)
        length = torch.linalg.vector_norm(momentum)
        left = torch.linalg.qr(momentum @ right)[0]
        image = momentum.mT @ left
        norms = torch.linalg.vector_norm(image, dim=0)
        momentum.addmm_(left, image.mT, alpha=cfg.momentum - 1)
        alive = norms > cfg.floor * length
        columns = image / (norms + cfg.eps)
        right.copy_(torch.where(alive, columns, right))
        factor = cfg.extra_scale_factor * shape_scale(info.shape, cfg.scale_mode)
        return (left * (factor * alive.to(left.dtype))) @ columns.mT

    def width_exponent(self) -> float:
        """Muon's: orthonormal factors keep their spectral norm, at a rank in proportion to the width."""
        return -0.5 if self.config.scale_mode == "spectral" else 0.0

    def cost(self, info: MatrixInfo) -> Cost:
        (rows, columns), rank = info.shape, self.rank(info)
        kind = "gemm" if min(info.shape) > 128 else "small_gemm"
        cost = Cost(
            # B·Q, Bᵀ·P, P·Rᵀ, P·Qᵀ; geqrf and householder_product of (out, r)
            flops={kind: 8.0 * rows * columns * rank, "qr": 4.0 * rows * rank**2 - 4.0 / 3.0 * rank**3},
            # momentum and gradient summed 3, norm 1, read by two products 2, deflated 2, direction 1
            elementwise_bytes=4.0 * (9 * rows * columns + 8 * columns * rank + 4 * rows * rank),
            state_bytes=self.moment_bytes(rows * columns) + 4.0 * columns * rank,
        )
        return self.with_conversion(cost)
