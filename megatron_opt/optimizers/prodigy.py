"""Prodigy: Adam with an estimate d of the distance to the solution as its learning rate. arXiv 2306.06101 (algorithm 4).

d is one number for all that the rule trains: its sums are over the whole model. `--lr` multiplies it, 1 in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.kernels.host import on_device
from megatron_opt.optimizers.base import Cost, Reducer, State, Step
from megatron_opt.optimizers.direction_optimizer import DisplacementOptimizer
from megatron_opt.optimizers.options import check, decay, epsilon, option
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True, kw_only=True)
class ProdigyConfig:
    """Hyperparameters of Prodigy; the authors' code's."""

    beta1: float = decay(0.9, "decay of the first moment")
    beta2: float = decay(0.999, "decay of the second moment")
    beta3: float = decay(0.0, "decay of the sums that estimate d; 0: the root of beta2")
    eps: float = epsilon(1e-8, "times d, added to the square root of the second moment")
    d0: float = option(1e-6, "the first d", low=1e-12, high=1.0)
    d_coef: float = option(1.0, "factor on the estimate of d", above=0, high=1e6)
    growth_rate: float = option(1e30, "d grows by this factor a step at most", low=1, high=1e30)
    bias_correction: bool = option(False, "steps times √(1−β2ᵗ)/(1−β1ᵗ)")
    safeguard_warmup: bool = option(False, "leave the learning rate out of the sum below the estimate")

    def __post_init__(self) -> None:
        check(self)


def _on(like: Tensor, number: Tensor | float) -> Tensor:
    """A number () in fp64 beside another, with no wait for the device."""
    value = number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)
    return on_device(value, like.device, torch.float64)


@register
class Prodigy(DisplacementOptimizer):
    """r ← β3·r + γd²/d0·⟨g, W₀ − W⟩, s ← β3·s + γd²/d0·g, d ← max(d, r/‖s‖₁); u = d·EMA(d·g)/(√EMA(d²g²) + dε)."""

    name = "prodigy"
    Config: ClassVar[type] = ProdigyConfig
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "distance_sum", "initial_weight")
    weight_keys: ClassVar[tuple[str, ...]] = ("initial_weight",)
    one_rate = True
    moved = 30  # s 2 and 3, m 2 and 3, v 2 and 3, root 2, add 2, quotient 3, rate 2, decay 3, sum 3
    summed = 10  # difference 3, product 3, sum 1; s that will be 2, its norm 1

    def __init__(self, config: ProdigyConfig) -> None:
        super().__init__(config)
        first = {"d": config.d0, "largest": config.d0, "numerator": 0.0}
        self.numbers = {"step": 0, **first, "past_d": config.d0, "rate": 0.0}

    @property
    def beta3(self) -> float:
        return float(self.config.beta3 or self.config.beta2**0.5)

    def init_state(self, param: Tensor) -> State:
        state = super().init_state(param)
        state["initial_weight"].copy_(param)
        return state

    def _rate(self, step: int, lr: float) -> float:
        """γ: the learning rate, bias-corrected on request."""
        o = self.config
        return lr * ((1 - o.beta2**step) ** 0.5 / (1 - o.beta1**step) if o.bias_correction else 1.0)

    def _gain(self, d: Tensor | float, step: int, lr: float) -> Tensor | float:
        """Weight of this gradient in s."""
        return d / self.config.d0 * d * (1.0 if self.config.safeguard_warmup else self._rate(step, lr))

    def global_sum_terms(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        step: int,
        lr: float,
        grad_scale: float = 1.0,
    ) -> Tensor | None:
        """⟨g, W₀ − W⟩ and ‖s‖₁ with this gradient in it, of each piece."""
        gain, wide = self._gain(self.numbers["d"], step, lr) * grad_scale, torch.float64
        terms = [
            torch.stack(
                [
                    (grad * (state["initial_weight"] - param)).sum(dtype=wide) * grad_scale,
                    (self.beta3 * state["distance_sum"] + gain * grad).abs().sum(dtype=wide),
                ]
            )
            for param, grad, state in zip(params, grads, states)
        ]
        return torch.stack(terms) if terms else torch.zeros(0, 2, dtype=wide)

    def advance(self, step: int, lr: float, sums: Tensor | None) -> None:
        """The estimate after this gradient; the step goes by the one before it."""
        o, now = self.config, self.numbers
        inner, norm = torch.zeros(2, dtype=torch.float64) if sums is None else sums
        d, largest, numerator = (_on(inner, now[key]) for key in ("d", "largest", "numerator"))
        rate = d * self._rate(step, lr)
        numerator = self.beta3 * numerator + d / o.d0 * rate * inner
        estimate = torch.where(norm > 0, o.d_coef * numerator / norm.clamp_min(1e-300), torch.zeros_like(norm))
        after = torch.where(d == o.d0, torch.maximum(d, estimate), d)
        largest = torch.maximum(largest, estimate)
        after = torch.minimum(largest, after * o.growth_rate)
        self.numbers = {
            "step": step, "d": after, "largest": largest, "numerator": numerator, "past_d": d, "rate": rate,
        }  # fmt: skip

    def apply(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], how: Step, reducer: Reducer
    ) -> None:
        if self.numbers["step"] != how.number:
            terms = self.global_sum_terms(params, grads, states, how.number, how.lr, how.grad_scale)
            self.advance(how.number, how.lr, None if terms is None else terms.sum(0))
        super().apply(params, grads, states, how, reducer)

    def displacement(self, param: Tensor, grad: Tensor, state: State, how: Step) -> Tensor:
        o, now = self.config, self.numbers
        past = now["past_d"]
        state["distance_sum"].mul_(self.beta3).add_(grad * self._gain(past, how.number, how.lr))
        first = state["exp_avg"].mul_(o.beta1).add_(grad * (past * (1 - o.beta1)))
        second = state["exp_avg_sq"].mul_(o.beta2).add_(grad.square() * (past * past * (1 - o.beta2)))
        adam = first / second.sqrt().add_(now["d"] * o.eps)
        scale = past * self._rate(how.number, 1.0)
        lost = self.decayed(param, adam, how) * scale
        return adam.mul_(now["rate"]).add_(lost)

    def width_exponent(self) -> float:
        raise UserError(
            "prodigy estimates one learning rate for all matrices, and µP wants one by kind; train without --use-mup."
        )

    def cost(self, numel: int) -> Cost:
        """Besides, what its two sums read."""
        cost = super().cost(numel)
        return Cost(elementwise_bytes=cost.elementwise_bytes + 4.0 * self.summed * numel, state_bytes=cost.state_bytes)
