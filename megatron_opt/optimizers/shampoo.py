"""Shampoo with blocks and grafting. arXiv 1802.09568, 2002.09018, 2309.06497."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import preconditioner
from megatron_opt.optimizers.base import Cost, MatrixInfo, State
from megatron_opt.optimizers.decomposition import decompose_or_keep
from megatron_opt.optimizers.factored import Blocks, FactoredConfig, FactoredOptimizer
from megatron_opt.optimizers.flag_coroutines import FlagCoroutine, joined
from megatron_opt.optimizers.options import choice, decay, epsilon, option
from megatron_opt.optimizers.partition import Partition
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True)
class ShampooConfig(FactoredConfig):
    """Hyperparameters of Shampoo."""

    beta1: float = decay(0.95, "decay of the first moment")
    grafting: str = choice("adam", ("adam", "none"), "take the length of the direction from AdamW's")
    graft_beta2: float = decay(0.98, "decay of the grafted rule's second moment", needs=("grafting", "adam"))
    graft_eps: float = epsilon(
        1e-10, "added to the square root of the grafted second moment", needs=("grafting", "adam")
    )
    damping: float = option(1e-4, "added to the factors, relative to their norm", low=1e-12, high=1e3)
    root: str = choice("eigh", ("eigh", "newton"), "inverse roots by eigendecomposition or coupled Newton")


@register
class Shampoo(FactoredOptimizer):
    """m ← EMA(g), bias-corrected;  direction = L^(−1/4)·m·R^(−1/4), its norm that of AdamW's; one side: power −1/2."""

    name: ClassVar[str] = "shampoo"
    Config: ClassVar[type] = ShampooConfig
    block_keys: ClassVar[tuple[str, ...]] = ("exp_avg",)

    @property
    def moment_keys(self) -> tuple[str, ...]:
        return (*self.block_keys, "graft_sq") if self.config.grafting == "adam" else self.block_keys

    def before_blocks(self, grad: Tensor, state: State) -> None:
        state["exp_avg"].lerp_(grad, 1 - self.config.beta1)

    def block_step(self, blocks: Blocks) -> FlagCoroutine[list[Tensor]]:
        ((moment,),) = blocks.states
        direction = moment / (1 - self.config.beta1**blocks.step)
        for side, (factor,) in blocks.factors.items():
            self.advance(factor, blocks.grads[0], side)
        if blocks.due:
            yield from self.refresh(blocks)
        for side, (root,) in blocks.derived.items():
            direction = root @ direction if side == 0 else direction @ root
        return [direction]

    def refresh(self, blocks: Blocks) -> FlagCoroutine[None]:
        """New roots from the factors."""
        cfg, order = self.config, 2 * len(blocks.factors)

        def root(mean: Tensor, doubts: Any = None) -> Tensor:
            roots = {"eigh": preconditioner.inverse_root_eigh, "newton": preconditioner.inverse_root_newton}
            return roots[cfg.root](mean, order, cfg.damping)

        means = {side: factor / (1 - cfg.shampoo_beta**blocks.step) for side, (factor,) in blocks.factors.items()}
        olds = [old for (old,) in blocks.derived.values()]
        computed = yield from joined(
            [decompose_or_keep(root, (mean,), keep=(old,)) for mean, old in zip(means.values(), olds)]
        )
        for ((new,), failed), old in zip(computed, olds):
            old.copy_(new)
            for block in failed:
                self.failed(blocks.names[block])

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        cfg = self.config
        directions = super().directions(grads, states, step, infos)
        for u, g, state in zip(directions, grads, states):
            if cfg.grafting == "adam":
                second = state["graft_sq"].mul_(cfg.graft_beta2).addcmul_(g, g, value=1 - cfg.graft_beta2)
                graft = state["exp_avg"] / ((second / (1 - cfg.graft_beta2**step)).sqrt_() + cfg.graft_eps)
                length = torch.linalg.vector_norm(graft) / (1 - cfg.beta1**step)
                norm = torch.linalg.vector_norm(u)
                u.mul_(torch.where(norm > 0, length / norm, torch.zeros_like(norm)))
        return directions

    def parts(self, info: MatrixInfo) -> Partition | None:
        """Blocks; none where the direction's length is AdamW's, a norm of the whole matrix."""
        return super().parts(info) if self.config.grafting == "none" else None

    def width_exponent(self) -> float:
        """As SOAP's with the length of AdamW's step; without it the step keeps its spectral norm."""
        return 0.0 if self.config.grafting == "none" else -0.5

    def cost(self, info: MatrixInfo) -> Cost:
        gemm, refresh, state = 0.0, 0.0, 4.0
        numel = torch.Size(info.shape).numel()
        for count, *block in self.grid(info).shapes():
            for side in self.sides(info):
                size, other = block[side], block[1 - side]
                gemm += count * 4.0 * size * size * other  # factor 2, root 2
                refresh += count * float(size**3)
                state += count * size * size * self.factor_bytes
        grafted = self.config.grafting == "adam"
        newton = self.config.root == "newton"
        cost = Cost(
            flops={"gemm" if self.is_large(info) else "small_gemm": gemm} if gemm else {},
            # eigh: V·Λ·Vᵀ beside the decomposition; Newton: about 20 iterations of two squarings and two products
            refresh={"gemm": 160.0 * refresh} if newton else {"eigh": 9.0 * refresh, "gemm": 2.0 * refresh},
            refresh_every=self.config.precondition_frequency,
            elementwise_bytes=4.0 * (10 + 8 * grafted) * numel,
            state_bytes=state + self.moment_bytes(numel, 1 + grafted),
        )
        return self.with_conversion(cost)
