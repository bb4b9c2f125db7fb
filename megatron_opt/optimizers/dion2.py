"""Dion2: the largest rows or columns of the momentum, orthogonalized; the rest stays for later steps. arXiv 2512.16928.

Dion3 (github.com/microsoft/dion, there NorDion2 too): rows, which NorMuon then normalizes by their running second moment.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.optimizers.base import Cost, MatrixInfo, Scalars, State, StateKind, StateSpec
from megatron_opt.optimizers.muon import SCALE_MODES, Muon, shape_scale
from megatron_opt.optimizers.narrow import NarrowOptimizer, moment_option
from megatron_opt.optimizers.options import check, choice, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True)
class Dion2Config:
    """Hyperparameters of Dion2; the authors' code's."""

    momentum: float = decay(0.95, "share μ of what was orthogonalized that stays in the momentum")
    fraction: float = option(0.25, "share of the rows or columns that are orthogonalized in a step", above=0, high=1)
    eps: float = option(1e-7, "added to the norm, whose squares fp32 must hold", low=1e-15, high=1.0)
    scale_mode: str = choice("unit_rms_norm", SCALE_MODES, "factor by the matrix's shape (out, in)")
    extra_scale_factor: float = option(1.0, "further factor on the update", above=0, high=1e6)
    num_ns_steps: int = option(5, "Newton–Schulz steps", low=1, high=100)
    coefficient_type: str = choice("polar_express", tuple(ns.SETS), "Newton–Schulz coefficients")
    fp32_matmul_prec: str = choice("medium", tuple(ns.ITERATION_DTYPES), "iterate in bf16 (medium) or fp32")
    moment_dtype: str = moment_option()

    def __post_init__(self) -> None:
        check(self)


@register
class Dion2(NarrowOptimizer):
    """B = M + G;  K: ⌈α·k⌉ slices of the shorter side with the largest ‖·‖₁;  M ← B, M_K ← μ·B_K;  u_K = √(out/in)·NS(B_K), else 0."""

    name: ClassVar[str] = "dion2"
    Config: ClassVar[type] = Dion2Config
    scalars: ClassVar[Scalars] = Muon.scalars  # steps are Muon's; the authors' ratio is 1

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = ns.coefficients(config.coefficient_type, config.num_ns_steps)

    def side(self, info: MatrixInfo) -> int:
        """Whose slices are chosen: 0 rows, 1 columns."""
        return int(info.shape[0] > info.shape[1])

    def chosen(self, info: MatrixInfo) -> int:
        """How many."""
        return max(1, math.ceil(self.config.fraction * info.shape[self.side(info)]))

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        if len(info.shape) != 2:
            raise UserError(
                f"{self.name} needs matrices, {info.name} has shape {info.shape}; route it to another optimizer."
            )
        return self.moments(weight, ("momentum_buffer",))

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        return self.moments_spec(("momentum_buffer",))

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        cfg, places, parts = self.config, [], []
        for grad, state, info in zip(grads, states, infos):
            momentum, side = state["momentum_buffer"].add_(grad), self.side(info)
            sizes = momentum.abs().sum(1 - side)
            place = torch.topk(sizes, self.chosen(info)).indices.sort().values
            part = momentum.index_select(side, place)
            momentum.index_copy_(side, place, part * cfg.momentum)
            places.append(place)
            parts.append(part)
        found = ns.orthogonalize(parts, self.table, cfg.eps, cfg.fp32_matmul_prec, "add")
        return [
            torch.zeros_like(grad).index_copy_(
                self.side(info), place, self.normalized(x, state, place).mul_(self.factor(info))
            )
            for x, grad, state, place, info in zip(found, grads, states, places, infos)
        ]

    def normalized(self, x: Tensor, state: State, place: Tensor) -> Tensor:
        """What follows the orthogonalization of the slices at `place`."""
        return x

    def factor(self, info: MatrixInfo) -> float:
        """Scale of the orthogonal slices."""
        return self.config.extra_scale_factor * shape_scale(info.shape, self.config.scale_mode)

    def width_exponent(self) -> float:
        """Muon's: orthonormal slices keep their spectral norm."""
        return -0.5 if self.config.scale_mode == "spectral" else 0.0

    def cost(self, info: MatrixInfo) -> Cost:
        numel, count, other = info.numel, self.chosen(info), info.shape[1 - self.side(info)]
        k, K = sorted((count, other))
        cost = Cost(
            flops={"gemm" if k > 128 else "small_gemm": ns.flops(k, K, self.table, self.config.fp32_matmul_prec)},
            # momentum and gradient summed 3, sizes 1, zeros 1; slices out, back, norm, normalized, scaled, placed
            elementwise_bytes=4.0 * (5 * numel + 12 * k * K),
            state_bytes=self.moment_bytes(numel),
        )
        return self.with_conversion(cost)


@dataclass(frozen=True)
class Dion3Config(Dion2Config):
    """Hyperparameters of Dion3; the authors' code's."""

    beta2: float = decay(0.95, "decay of a row's second moment")
    row_eps: float = epsilon(1e-8, "added to the root of a row's second moment")


@register
class Dion3(Dion2):
    """Dion2 of rows; v_K ← EMA(mean(u_K²) by row), u_K/(√v_K + ε) at the norm that u_K had."""

    name: ClassVar[str] = "dion3"
    Config: ClassVar[type] = Dion3Config

    def side(self, info: MatrixInfo) -> int:
        return 0

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        return super().init_state(weight, info) | {"row_second_moment": weight.new_zeros(len(weight), 1)}

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        return super().state_spec(info) | {"row_second_moment": StateKind.ROWS}

    def normalized(self, x: Tensor, state: State, place: Tensor) -> Tensor:
        moments = state["row_second_moment"]
        moment = moments.index_select(0, place).lerp_(x.square().mean(1, keepdim=True), 1 - self.config.beta2)
        moments.index_copy_(0, place, moment)
        rows = x / (moment.sqrt() + self.config.row_eps)
        return rows * (x.norm() / rows.norm().clamp_min(torch.finfo(x.dtype).tiny))

    def cost(self, info: MatrixInfo) -> Cost:
        cost, part, rows = super().cost(info), self.chosen(info) * info.shape[1], 4.0 * info.shape[0]
        moved = cost.elementwise_bytes + 4.0 * 8 * part
        return replace(cost, elementwise_bytes=moved, state_bytes=cost.state_bytes + rows)
