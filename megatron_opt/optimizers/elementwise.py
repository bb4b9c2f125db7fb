"""Rules on single elements: AdamW, NAdamW, Mars, Cautious, Lion, Signum, as coefficients of one fused kernel.

The study's forms (arXiv 2509.02046) are the defaults; where others differ, an option names theirs.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import multi_tensor, quantize
from megatron_opt.kernels.host import on_device
from megatron_opt.kernels.multi_tensor import Coefficients, Sum, UpdateKind
from megatron_opt.optimizers.base import Cost, ElementwiseOptimizer, Reducer, State, Step
from megatron_opt.optimizers.options import check, choice, decay, epsilon, option
from megatron_opt.optimizers.registry import register

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True, kw_only=True)
class ElementwiseConfig:
    """What every element-wise rule shares."""

    state_dtype: str = choice("fp32", tuple(STATE_DTYPES), "moments in fp32, bf16 or 8-bit blocks of 2048")
    rounding: str = choice("nearest", ("nearest", "stochastic"), "rounding of bf16 parameters and narrow states")
    rounding_seed: int = option(0, "seed of stochastic rounding", low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        check(self)


class FusedOptimizer(ElementwiseOptimizer):
    """A rule of the fused kernel: a subclass names it and its states, and computes a step's coefficients."""

    update_kind: ClassVar[UpdateKind]
    summed: ClassVar[tuple[str, ...]] = ()  # what the sums before the update read: "grad" or a state
    written: ClassVar[int | None] = None  # states that the update writes, from the first; None: all
    quantizable: ClassVar[dict[str, torch.dtype]] = {}  # states that may be 8-bit: int8 signed, uint8 non-negative

    def coefficients(self, step: int) -> Coefficients:
        """Coefficients of step `step` ≥ 1, without learning rate, decay and gradient scale."""
        raise NotImplementedError

    def scales(
        self, grads: Sequence[Tensor], states: Sequence[State], c: Coefficients, reducer: Reducer
    ) -> Tensor | None:
        """(n, 2): the rule's scale and a factor on the new parameter for each piece; None where all are 1."""
        return None

    def state_dtype(self, key: str, param: Tensor) -> torch.dtype:
        """Type of a state; fp64 parameters have fp64 states."""
        if param.dtype == torch.float64:
            return torch.float64
        wanted = STATE_DTYPES[self.config.state_dtype]
        if wanted == torch.int8:
            return self.quantizable.get(key, torch.float32)
        return wanted

    def init_state(self, param: Tensor) -> State:
        """Zeros for every state key."""
        state = {}
        for key in self.state_keys:
            state[key] = torch.zeros_like(
                param, dtype=self.state_dtype(key, param), memory_format=torch.contiguous_format
            )
            if not state[key].is_floating_point():
                state[f"{key}_absmax"] = param.new_zeros(quantize.blocks(param.numel()), dtype=torch.float32)
        return state

    def apply(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], how: Step, reducer: Reducer
    ) -> None:
        c = self.coefficients(how.number)._replace(lr=how.lr, decay_factor=how.decay_factor, grad_scale=how.grad_scale)
        multi_tensor.update(
            self.update_kind,
            params,
            grads,
            [[state[key] for state in states] for key in self.state_keys],
            c,
            copies=how.copies,
            absmax=[self._absmax(states, key) for key in self.state_keys[:2]] + [()] * (2 - len(self.state_keys)),
            scales=self.scales(grads, states, c, reducer),
            cautious_decay=how.cautious_decay,
            stochastic=self.config.rounding == "stochastic",
            seed=self.config.rounding_seed,
            step=how.number,
            element_offsets=how.element_offsets,
        )

    def _absmax(self, states: Sequence[State], key: str) -> list[Tensor]:
        name = f"{key}_absmax"
        return [state[name] for state in states] if states and name in states[0] else []

    def cost(self, numel: int) -> Cost:
        """Parameter read and written, gradient read, states read and written; then what sums read before."""
        widths = {"grad": 4.0} | {key: self._width(key) for key in self.state_keys}
        passes = (*self.state_keys, *self.state_keys[: self.written], *self.summed)
        moved = 12.0 + sum(widths[key] for key in passes)
        state = sum(widths[key] for key in self.state_keys)
        return Cost(elementwise_bytes=moved * numel, state_bytes=state * numel)

    def _width(self, key: str) -> float:
        if self.config.state_dtype == "int8":
            return 1.0 + 4.0 / quantize.BLOCK if key in self.quantizable else 4.0
        return 2.0 if self.config.state_dtype == "bf16" else 4.0


def adam_coefficients(beta1: float, beta2: float, eps: float, step: int) -> Coefficients:
    """m̂/(√v̂ + ε) with both moments bias-corrected."""
    return Coefficients(
        beta1=beta1,
        input_weight1=1.0 - beta1,
        beta2=beta2,
        input_weight2=1.0 - beta2,
        eps=eps,
        momentum_weight=1.0 / (1.0 - beta1**step),
        inv_sqrt_correction2=(1.0 - beta2**step) ** -0.5,
    )


def pairs(scale: Tensor, like: Tensor) -> Tensor:
    """Scales (n,) beside a factor of 1 on the parameter, (n, 2) in the type of the arithmetic."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.stack((scale, torch.ones_like(scale)), 1).to(dtype)


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(ElementwiseConfig):
    """Hyperparameters of AdamW; tuned values of the study."""

    beta1: float = decay(0.9, "decay of the first moment")
    beta2: float = decay(0.98, "decay of the second moment")
    eps: float = epsilon(1e-10, "added to the square root of the second moment")


@register
class AdamW(FusedOptimizer):
    """u = m̂/(√v̂ + ε); m, v are EMAs of g and g² (arXiv 1711.05101)."""

    name = "adamw"
    Config: ClassVar[type] = AdamWConfig
    update_kind = UpdateKind.ADAM
    state_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    quantizable: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}

    def coefficients(self, step: int) -> Coefficients:
        o = self.config
        return adam_coefficients(o.beta1, o.beta2, o.eps, step)


@dataclass(frozen=True, kw_only=True)
class NAdamWConfig(AdamWConfig):
    """Hyperparameters of NAdamW; tuned values of the study."""

    beta1: float = decay(0.95, "decay of the first moment")
    form: str = choice("study", ("study", "torch"), "optax's Nesterov form, or torch.optim.NAdam's momentum schedule")
    momentum_decay: float = option(4e-3, "momentum schedule of form=torch", low=0, high=1e3, needs=("form", "torch"))


@functools.cache
def _momentum_product(beta1: float, decay: float, step: int) -> float:
    """Πμ_i over steps 1 … step of torch.optim.NAdam."""
    product = 1.0
    for i in range(1, step + 1):
        product *= _scheduled_momentum(beta1, decay, i)
        if product < 1e-300:
            return 0.0
    return product


def _scheduled_momentum(beta1: float, decay: float, step: int) -> float:
    return beta1 * (1.0 - 0.5 * 0.96 ** (step * decay))


@register
class NAdamW(AdamW):
    """AdamW with m̂ = β1·m/(1 − β1^(t+1)) + (1 − β1)·g/(1 − β1^t) (Dozat 2016, as optax writes it)."""

    name = "nadamw"
    Config: ClassVar[type] = NAdamWConfig

    def coefficients(self, step: int) -> Coefficients:
        o, c = self.config, super().coefficients(step)
        if o.form == "torch":
            now, following = (_scheduled_momentum(o.beta1, o.momentum_decay, t) for t in (step, step + 1))
            product = _momentum_product(o.beta1, o.momentum_decay, step)
            return c._replace(
                momentum_weight=following / (1.0 - product * following), gradient_weight=(1.0 - now) / (1.0 - product)
            )
        return c._replace(
            momentum_weight=o.beta1 / (1.0 - o.beta1 ** (step + 1)),
            gradient_weight=(1.0 - o.beta1) / (1.0 - o.beta1**step),
        )


@dataclass(frozen=True, kw_only=True)
class MarsConfig(AdamWConfig):
    """Hyperparameters of Mars; tuned values of the study."""

    beta1: float = decay(0.95, "decay of the first moment")
    eps: float = epsilon(1e-25, "added to the square root of the second moment")
    gamma: float = option(0.025, "strength of the variance correction", low=0, high=100)
    max_grad_norm: float = option(1.0, "clip of the corrected gradient; 0 for none", low=0, high=1e9)
    clip_scope: str = choice("global", ("global", "matrix"), "norm over all matrices, or over each (the authors' form)")


@register
class Mars(AdamW):
    """AdamW of c = g + γβ1/(1 − β1)·(g − g_prev), c clipped by its own norm; g_prev is 0 at first (arXiv
    2411.10438).

    The raw gradient is not clipped. Over `matrix`, the norm has nothing added, as in the authors' code.
    """

    name = "mars"
    Config: ClassVar[type] = MarsConfig
    clip = False
    update_kind = UpdateKind.MARS
    state_keys = ("exp_avg", "exp_avg_sq", "prev_grad")
    summed = ("grad", "prev_grad")

    def coefficients(self, step: int) -> Coefficients:
        o = self.config
        return super().coefficients(step)._replace(gamma=o.gamma * o.beta1 / (1.0 - o.beta1))

    def _squares(self, grads: Sequence[Tensor], states: Sequence[State], c: Coefficients) -> Tensor:
        """‖c‖² of each piece."""
        return multi_tensor.sums(Sum.MARS_NORM, grads, c, states=[state["prev_grad"] for state in states])[:, 0]

    def global_sum_terms(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        step: int,
        lr: float,
        grad_scale: float = 1.0,
    ) -> Tensor | None:
        if self.config.max_grad_norm == 0 or self.config.clip_scope != "global":
            return None
        return self._squares(grads, states, self.coefficients(step)._replace(grad_scale=grad_scale)).unsqueeze(1)

    def scales(
        self, grads: Sequence[Tensor], states: Sequence[State], c: Coefficients, reducer: Reducer
    ) -> Tensor | None:
        limit = self.config.max_grad_norm
        if limit == 0:
            return None
        if self.config.clip_scope == "global":
            total = self._squares(grads, states, c).sum() if reducer.global_sum is None else reducer.global_sum[0]
            norms = (total.sqrt() + 1e-6).expand(len(grads))
        else:
            norms = reducer.per_matrix(self._squares(grads, states, c)).sqrt()
        if not grads:
            return None
        return pairs((limit / norms.to(grads[0].device)).clamp(max=1.0), grads[0])


@dataclass(frozen=True, kw_only=True)
class CautiousConfig(AdamWConfig):
    """Hyperparameters of Cautious AdamW; tuned values of the study."""

    beta1: float = decay(0.98, "decay of the first moment")
    eps: float = epsilon(1e-25, "added to the square root of the second moment, and to the mask's mean")
    form: str = choice("study", ("study", "authors"), "divide the mask by mean + eps, or by max(mean, 1e-3)")


@register
class Cautious(AdamW):
    """u·mask/(mean(mask) + ε) with AdamW's u and mask = (u·g > 0), the mean per logical matrix (arXiv
    2411.16085).
    """

    name = "cautious"
    Config: ClassVar[type] = CautiousConfig
    update_kind = UpdateKind.CAUTIOUS
    summed = ("grad", "exp_avg")

    def scales(
        self, grads: Sequence[Tensor], states: Sequence[State], c: Coefficients, reducer: Reducer
    ) -> Tensor | None:
        first = [state["exp_avg"] for state in states]
        absmax = self._absmax(states, "exp_avg")
        kept = multi_tensor.sums(Sum.CAUTIOUS_MASK, grads, c, states=first, absmax=absmax)[:, 0]
        mean = reducer.per_matrix(kept) / on_device(reducer.numel, kept.device, torch.float64)
        if not grads:
            return None
        return pairs(1.0 / (mean + self.config.eps if self.config.form == "study" else mean.clamp(min=1e-3)), grads[0])


@dataclass(frozen=True, kw_only=True)
class LionConfig(ElementwiseConfig):
    """Hyperparameters of Lion; tuned values of the study."""

    beta1: float = decay(0.9, "weight of the momentum in the direction")
    beta2: float = decay(0.95, "decay of the momentum (0.98 at the largest sizes)")


@register
class Lion(FusedOptimizer):
    """u = sign(β1·m + (1 − β1)·g), then m ← β2·m + (1 − β2)·g (arXiv 2302.06675)."""

    name = "lion"
    Config: ClassVar[type] = LionConfig
    update_kind = UpdateKind.LION
    state_keys = ("exp_avg",)
    quantizable: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8}

    def coefficients(self, step: int) -> Coefficients:
        o = self.config
        return Coefficients(beta1=o.beta1, input_weight1=1.0 - o.beta1, beta2=o.beta2, input_weight2=1.0 - o.beta2)


@dataclass(frozen=True, kw_only=True)
class SignumConfig(ElementwiseConfig):
    """Hyperparameters of Signum; tuned value of the study's Scion, whose scalar parameters it trains."""

    beta1: float = decay(0.98, "decay of the momentum")
    nesterov: bool = option(False, "sign of β1·m + (1 − β1)·g in place of m's")


@register
class Signum(FusedOptimizer):
    """u = sign(m), m an EMA of g (arXiv 1802.04434)."""

    name = "signum"
    Config: ClassVar[type] = SignumConfig
    update_kind = UpdateKind.SIGNUM
    state_keys = ("exp_avg",)
    quantizable: ClassVar[dict[str, torch.dtype]] = {"exp_avg": torch.int8}

    def coefficients(self, step: int) -> Coefficients:
        o = self.config
        c = Coefficients(beta1=o.beta1, input_weight1=1.0 - o.beta1)
        return c._replace(momentum_weight=o.beta1, gradient_weight=1.0 - o.beta1) if o.nesterov else c
