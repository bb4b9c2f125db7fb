"""Schedule-free AdamW: gradients between the last iterate and the average of all, which is what is evaluated. arXiv 2405.15682.

z ← z − γ·(ĝ + λy), x ← (1−c)·x + c·z, y = (1−β1)·z + β1·x with c = γ_max²/Σγ_max², ĝ = g/(√v̂ + ε) at y, γ_max the largest rate
so far. The weights are y; beside v the state is y − x, which gives z too, and begins at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_opt.optimizers.base import Reducer, State, Step
from megatron_opt.optimizers.direction_optimizer import DisplacementOptimizer
from megatron_opt.optimizers.options import check, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeConfig:
    """Hyperparameters of schedule-free AdamW; the authors'."""

    beta1: float = decay(0.9, "share of the average x in y, where gradients are taken")
    beta2: float = decay(0.999, "decay of the second moment")
    eps: float = epsilon(1e-8, "added to the square root of the second moment")
    weight_lr_power: float = option(
        2.0, "power of the largest rate so far in a step's weight in the average", low=0, high=10
    )
    weight_step_power: float = option(0.0, "power of the step's number in it", low=0, high=100)

    def __post_init__(self) -> None:
        check(self)


@register
class ScheduleFree(DisplacementOptimizer):
    """y ← y − γ(1−β1(1−c))·s + c·β1/(1−β1)·a, a ← (1−c)(a − γ(1−β1)·s); s = g/(√v̂ + ε) + λy, a = y − x (arXiv 2405.15682)."""

    name = "schedule_free"
    Config: ClassVar[type] = ScheduleFreeConfig
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg_sq", "lead")
    lead_key = "lead"
    own_schedule = True
    moved = (
        29  # mul 2, addcmul 3, root 2, div 2, add 1, quotient 3, rate 2, decay 3, sum 3, lead's step 3, scaled 2, y's 3
    )

    def __init__(self, config: ScheduleFreeConfig) -> None:
        super().__init__(config)
        self.numbers = {"step": 0, "share": 0.0, "largest_rate": 0.0, "weights": 0.0}

    def advance(self, step: int, lr: float, sums: Tensor | None) -> None:
        """c of this step: its weight over that of all so far."""
        o, now = self.config, self.numbers
        largest = max(now["largest_rate"], lr)
        weight = step**o.weight_step_power * largest**o.weight_lr_power
        total = now["weights"] + weight
        share = weight / total if total else 0.0
        self.numbers = {"step": step, "share": share, "largest_rate": largest, "weights": total}

    def apply(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], how: Step, reducer: Reducer
    ) -> None:
        if self.numbers["step"] != how.number:
            self.advance(how.number, how.lr, None)
        super().apply(params, grads, states, how, reducer)

    def displacement(self, param: Tensor, grad: Tensor, state: State, how: Step) -> Tensor:
        o, share, lead = self.config, self.numbers["share"], state["lead"]
        second = state["exp_avg_sq"].mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
        adam = grad / second.sqrt().div_((1 - o.beta2**how.number) ** 0.5).add_(o.eps)
        step = self.decayed(param, adam, how).add_(adam, alpha=how.lr)  # γ·s
        moved = step * (1 - o.beta1 * (1 - share)) - (share * o.beta1 / (1 - o.beta1)) * lead
        lead.sub_(step, alpha=1 - o.beta1).mul_(1 - share)
        return moved
