"""Faults of Megatron-Core 0.19.2 that change numbers, mended on every machine; each says what is wrong and how it shows."""

from typing import Any

import torch

from megatron_opt.layout.quantized import is_quantized, set_initial_values


def _global_aux_loss(original: Any) -> Any:
    """MoE's global_aux_loss: each rank's part is over the tokens of all data-parallel ranks, then averaged over them.

    The sum of the parts is the loss, the average of gradients divides it by DP once more (4 sequences and coefficient 1000:
    gradient norm 528.2 on one rank, 264.2 on two). The gradient is scaled back; the logged value, a sum, is right as it is.
    """

    def attach(
        self: Any, activation: Any, coefficient: float, loss: Any, name: str, group: Any, *rest: Any, **named: Any
    ) -> Any:
        if name == "global_load_balancing_loss":
            copies = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
            loss = copies * loss - (copies - 1) * loss.detach()
        return original(self, activation, coefficient, loss, name, group, *rest, **named)

    return attach


def _drawn_on_the_cpu(original: Any) -> Any:
    """--use-cpu-initialization with --fp8-param-gather: a weight remembers for its main copy what it was made with, unset memory.

    Values are drawn after it is made and reach its FP8 numbers alone: losses of NaN, or of a model that nobody drew.
    """

    def initialize(weight: Any, *rest: Any, **named: Any) -> Any:
        if not is_quantized(weight):
            return original(weight, *rest, **named)
        values = torch.empty(weight.shape, dtype=weight.dtype)
        found = original(values, *rest, **named)
        with torch.no_grad():
            set_initial_values(weight, values)
        return found

    return initialize


def install() -> None:
    """Patch Megatron-Core for this process, once; imports it."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.moe.router import TopKRouter

    if transformer_engine._initialize_affine_weight_cpu.__name__ != "initialize":
        drawn = _drawn_on_the_cpu(transformer_engine._initialize_affine_weight_cpu)
        transformer_engine._initialize_affine_weight_cpu = drawn
    original = TopKRouter.attach_and_log_load_balancing_loss
    if original.__name__ != "attach":
        TopKRouter.attach_and_log_load_balancing_loss = _global_aux_loss(original)
