"""AdEMAMix: Adam with a second, slow average of the gradient beside the fast one (arXiv 2409.03137)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_opt.optimizers.base import State
from megatron_opt.optimizers.direction_optimizer import DirectionOptimizer
from megatron_opt.optimizers.options import check, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True, kw_only=True)
class AdEMAMixConfig:
    """Hyperparameters of AdEMAMix; the paper's."""

    beta1: float = decay(0.9, "decay of the fast moment")
    beta2: float = decay(0.999, "decay of the second moment")
    beta3: float = decay(0.9999, "decay of the slow moment")
    alpha: float = option(5.0, "weight of the slow moment", low=0, high=1e3)
    warmup_steps: int = option(
        0, "steps over which alpha grows from 0 and beta3 from beta1: the paper's is the whole run; 0: none",
        low=0, high=10**12,
    )  # fmt: skip
    eps: float = epsilon(1e-8, "added to the square root of the second moment")

    def __post_init__(self) -> None:
        check(self)


@register
class AdEMAMix(DirectionOptimizer):
    """u = (m̂₁ + α·m₂)/(√v̂ + ε); m₁, m₂ are EMAs of g by β1 and β3, v of g²; m₂ is not bias-corrected (arXiv 2409.03137)."""

    name = "ademamix"
    Config: ClassVar[type] = AdEMAMixConfig
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    moved = 25  # lerp 3 and 3, mul 2, addcmul 3, root 2, div 2, add 2, mean div 2, mix 3, quotient 3

    def scheduled(self, step: int) -> tuple[float, float]:
        """(α, β3) at a step: α grows linearly, and β3 so that its half-life does."""
        o = self.config
        if step >= o.warmup_steps:
            return o.alpha, o.beta3
        share = step / o.warmup_steps
        if min(o.beta1, o.beta3) == 0.0:  # no half-life
            return share * o.alpha, o.beta3
        return share * o.alpha, min(
            o.beta3, math.exp(1 / ((1 - share) / math.log(o.beta1) + share / math.log(o.beta3)))
        )

    def direction(self, grad: Tensor, state: State, step: int) -> Tensor:
        o, (alpha, beta3) = self.config, self.scheduled(step)
        fast = state["exp_avg"].lerp_(grad, 1 - o.beta1)
        slow = state["exp_avg_slow"].lerp_(grad, 1 - beta3)
        second = state["exp_avg_sq"].mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
        root = second.sqrt().div_((1 - o.beta2**step) ** 0.5).add_(o.eps)
        return (fast / (1 - o.beta1**step)).add_(slow, alpha=alpha).div_(root)
