"""KL-Shampoo: the momentum whitened by KL-SOAP's factors, L^(−1/2)·m·R^(−1/2), with no second moment. arXiv 2509.03378.

E[g gᵀ] ≈ R ⊗ L: the product of both factors has the scale of a gradient's square. They start as √mean(g²)·I of the first gradient,
as whitening by two factors of one and the same gradient would divide by its singular values twice. The authors' code starts
eigenvalues at 0.1 whatever the scale and follows them by a moving average of their own; here they are diag(QᵀLQ).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.optimizers.base import Cost, MatrixInfo, State
from megatron_opt.optimizers.bases import rotate
from megatron_opt.optimizers.factored import Blocks, FactoredConfig
from megatron_opt.optimizers.flag_coroutines import FlagCoroutine
from megatron_opt.optimizers.kl_soap import KlSoap, KlSoapConfig
from megatron_opt.optimizers.options import choice, decay, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True)
class KlShampooConfig(FactoredConfig):
    """Hyperparameters of KL-Shampoo; KL-SOAP's."""

    factor_precision: str = choice("fp64", ("bf16", "fp32", "fp64"), "dtype of the factors; bf16: of bases too")
    beta1: float = decay(0.95, "decay of the first moment")
    variant: str = choice("study", ("study", "authors"), "which form of counting and refreshing")
    power_shift: float = option(
        KlSoapConfig.power_shift, "refresh from factors plus this share of their largest eigenvalue", low=0, high=100
    )
    adaptive_tol: float = option(
        0.0, "skip a due refresh while a probe of the basis turns less than this", low=0, high=1
    )
    eigenvalue_floor: float = option(
        KlSoapConfig.eigenvalue_floor, "least eigenvalue over a factor's mean: unseen directions are not blown up",
        low=1e-8, high=1,
    )  # fmt: skip


@register
class KlShampoo(KlSoap):
    """m ← EMA(g);  u = Q_L [Q_Lᵀ m Q_R/√(λ_L λ_Rᵀ)] Q_Rᵀ/(1−β1ⁿ), λ = diag(QᵀLQ), diag(QᵀRQ) before this step."""

    name: ClassVar[str] = "kl_shampoo"
    Config: ClassVar[type] = KlShampooConfig
    block_keys: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def begin(self, grad: Tensor, state: State, info: MatrixInfo) -> FlagCoroutine[bool]:
        """Bases of the first gradient; factors of its scale, and of no direction."""
        starts = yield from super().begin(grad, state, info)
        sides = self.sides(info)
        for region, stack in enumerate(self.grid(info).cut(grad)):
            level = stack.square().mean((-2, -1)) ** (1 / max(len(sides), 1))
            for factor in self.factors_of(state, sides, region)[0].values():
                factor.zero_().diagonal(dim1=-2, dim2=-1).add_(level.to(factor.dtype).unsqueeze(-1))
        return starts

    def block_step(self, blocks: Blocks) -> FlagCoroutine[list[Tensor]]:
        cfg, (grad,), ((mean,),) = self.config, blocks.grads, blocks.states
        late = blocks.due and not self.authors
        mean.lerp_(grad, 1 - cfg.beta1)
        bases = {side: basis for side, (basis,) in blocks.derived.items()}
        direction = rotate(mean, bases)
        for side, (factor,) in blocks.factors.items():
            roots = self.inverse_roots(factor, bases[side].to(factor.dtype)).to(direction.dtype)
            direction = direction * (roots.unsqueeze(-1) if side == 0 else roots.unsqueeze(-2))
        n = max(blocks.step - 1 if self.authors else blocks.step, 1)
        direction = rotate(direction, bases, back=True) / (1 - cfg.beta1**n)
        if not late:
            self.advance_factors(blocks)
        if blocks.due:
            yield from self.refresh(blocks)
        if late:
            self.advance_factors(blocks)
        return [direction]

    def follow(
        self,
        moments: Sequence[Tensor],
        bases: dict[int, Tensor],
        new: dict[int, Tensor],
        orders: Mapping[int, Tensor],
    ) -> None:
        """The moment is in no basis."""

    def cost(self, info: MatrixInfo) -> Cost:
        sides, numel = self.sides(info), torch.Size(info.shape).numel()
        gemm, refresh, state = 0.0, {"gemm": 0.0, "qr": 0.0}, 4.0
        for count, *block in self.grid(info).shapes():
            for side in sides:
                size, other = block[side], block[1 - side]
                gemm += count * 6.0 * size * size * other  # factor 2, rotations of m 4
                gemm += count * 2.0 * size**3  # eigenvalues
                if len(sides) == 2:
                    gemm += count * 2.0 * size * size * (size + other)  # again, for the whitened gradient
                refresh["gemm"] += count * 2.0 * size**3
                refresh["qr"] += count * 8.0 / 3.0 * size**3
                state += count * size * size * self.factor_bytes
        cost = Cost(
            flops={"gemm" if self.is_large(info) else "small_gemm": gemm} if gemm else {},
            refresh=refresh if gemm else {},
            refresh_every=self.config.precondition_frequency,
            elementwise_bytes=4.0 * (18 if len(sides) == 2 else 12) * numel,
            state_bytes=state + self.moment_bytes(numel),
        )
        return self.with_conversion(cost)
