"""ADOPT: Adam whose gradient is divided by the second moment of the steps before, then averaged (arXiv 2411.02853)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.optimizers.base import State
from megatron_opt.optimizers.direction_optimizer import DirectionOptimizer
from megatron_opt.optimizers.options import check, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True, kw_only=True)
class AdoptConfig:
    """Hyperparameters of ADOPT; the paper's."""

    beta1: float = decay(0.9, "decay of the momentum")
    beta2: float = decay(0.9999, "decay of the second moment")
    eps: float = epsilon(1e-6, "least value of the second moment's square root")
    clip_exponent: float = option(0.25, "normalized gradients are clipped to ±(t−1)^this", low=0, high=1)

    def __post_init__(self) -> None:
        check(self)


@register
class Adopt(DirectionOptimizer):
    """u = m, m ← EMA(clip(g/max(√v₋₁, ε), ±(t−1)^¼)), then v ← EMA(g²); step 1 only sets v = g² (arXiv 2411.02853)."""

    name = "adopt"
    Config: ClassVar[type] = AdoptConfig
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    moved = 19  # root 2, clamp 2, quotient 3, clip 2, lerp 3, copy 2, mul 2, addcmul 3

    def direction(self, grad: Tensor, state: State, step: int) -> Tensor:
        o, mean, second = self.config, state["exp_avg"], state["exp_avg_sq"]
        if step == 1:
            second.copy_(grad.square())
            return torch.zeros_like(grad)
        limit = (step - 1) ** o.clip_exponent
        mean.lerp_((grad / second.sqrt().clamp_min_(o.eps)).clamp_(-limit, limit), 1 - o.beta1)
        second.mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
        return mean.clone()
