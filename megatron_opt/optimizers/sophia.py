"""Sophia: momentum over an estimate of the Hessian's diagonal, clipped per element (arXiv 2305.14342)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import multi_tensor
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers.base import State
from megatron_opt.optimizers.elementwise import ElementwiseConfig, FusedOptimizer
from megatron_opt.optimizers.options import choice, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True, kw_only=True)
class SophiaConfig(ElementwiseConfig):
    """Hyperparameters of Sophia; tuned values of the study."""

    beta1: float = decay(0.95, "decay of the momentum")
    beta2: float = decay(0.9, "decay of the curvature estimate")
    gamma: float = option(0.0125, "factor on the curvature: larger clips less", above=0, high=1e6)
    eps: float = epsilon(1e-7, "least value of the divisor")
    curvature_every: int = option(10, "steps between curvature estimates", low=1, high=10**12)
    curvature: str = choice(
        "gnb", ("gnb", "hutchinson"), "estimate: Gauss-Newton-Bartlett on sampled labels, or the Hessian's own diagonal"
    )
    form: str = choice("study", ("study", "authors"), "bias-corrected momentum, or the authors' uncorrected one")


@register
class Sophia(FusedOptimizer):
    """u = clip(m̂/max(γ·h, ε), ±1); m is an EMA of g, h one of the Hessian diagonal's estimates, uncorrected.

    An estimate made after step t (t a multiple of `curvature_every`) is first used at t + 1: h = 0 and
    u ≈ sign(m) until then, as in the study.
    """

    name = "sophia"
    Config: ClassVar[type] = SophiaConfig
    update_kind = UpdateKind.SOPHIA
    state_keys = ("exp_avg", "hessian")
    written = 1
    quantizable: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8}

    def coefficients(self, step: int) -> Coefficients:
        o = self.config
        momentum_weight = 1.0 / (1.0 - o.beta1**step) if o.form == "study" else 1.0
        return Coefficients(
            beta1=o.beta1, input_weight1=1.0 - o.beta1, eps=o.eps, momentum_weight=momentum_weight, gamma=o.gamma
        )

    def curvature_due(self, step: int) -> bool:
        """Whether an estimate is to be made after step `step` (from 1)."""
        return step % self.config.curvature_every == 0

    def update_curvature(
        self, states: Sequence[State], estimates: Sequence[Tensor], scale: float = 1.0, squared: bool = False
    ) -> None:
        """h ← β2·h + (1 − β2)·scale·estimate; the estimate is squared first with `squared`.

        Gauss–Newton–Bartlett: estimates = gradient of the mean loss on labels sampled from the model,
        `squared`, scale = number of labels. Hutchinson: estimates = z·(Hz), scale 1.
        """
        gain = 1.0 - self.config.beta2
        values = [estimate.square() if squared else estimate for estimate in estimates]
        hessian = [state["hessian"] for state in states]
        c = Coefficients(lr=-gain, decay_factor=gain, grad_scale=scale)  # h − (−gain·scale·estimate + gain·h)
        multi_tensor.update(UpdateKind.APPLY, hessian, values, (), c)
