"""Adam with a slow average of the gradient beside the fast one, as a package of one's own would hold it: one file, one entry point."""

from dataclasses import dataclass

import torch

from megatron_opt.optimizers.base import Cost, MatrixOptimizer
from megatron_opt.optimizers.options import check, decay, epsilon, option


@dataclass(frozen=True)
class TwoAveragesConfig:
    """Hyperparameters of TwoAverages."""

    beta1: float = decay(0.9, "decay of the fast moment")
    beta2: float = decay(0.98, "decay of the second moment")
    beta3: float = decay(0.999, "decay of the slow moment")
    alpha: float = option(5.0, "weight of the slow moment", low=0, high=100)
    eps: float = epsilon(1e-10, "added to the square root of the second moment")

    def __post_init__(self):
        check(self)


class TwoAverages(MatrixOptimizer):
    """u = (m₁/(1 − β1ᵗ) + α·m₂)/(√(v/(1 − β2ᵗ)) + ε)."""

    name = "two_averages"
    Config = TwoAveragesConfig
    vectors = True
    clip = True

    def init_state(self, weight, info):
        return {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_slow", "exp_avg_sq")}

    def update(self, grads, states, step, infos):
        o, directions = self.config, []
        for g, s in zip(grads, states):
            s["exp_avg"].lerp_(g, 1 - o.beta1)
            s["exp_avg_slow"].lerp_(g, 1 - o.beta3)
            s["exp_avg_sq"].mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
            root = (s["exp_avg_sq"] / (1 - o.beta2**step)).sqrt_().add_(o.eps)
            directions.append((s["exp_avg"] / (1 - o.beta1**step)).add_(s["exp_avg_slow"], alpha=o.alpha).div_(root))
        return directions

    def width_exponent(self):
        return -1.0

    def cost(self, info):
        return Cost(elementwise_bytes=4.0 * 9 * info.numel, state_bytes=12.0 * info.numel)
