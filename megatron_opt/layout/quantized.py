"""Parameters that are Transformer Engine's quantized tensors: bytes and scales that say bf16, and have no flat view."""

from typing import Any

from torch import Tensor


def is_quantized(param: Any) -> bool:
    """Whether a parameter is one of Transformer Engine's quantized tensors, whatever type it says it has."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(param))


def initial_values(param: Any) -> Tensor:
    """What a quantized parameter was before it was quantized, flat, on its device; it is forgotten by the parameter."""
    values = param.get_high_precision_init_val()
    assert values is not None, "a main copy would start from FP8"
    param.clear_high_precision_init_val()
    return values.detach().reshape(-1).to(param.device)  # type: ignore[no-any-return]


def set_initial_values(param: Any, values: Tensor) -> None:
    """Quantize initial values into a parameter, and let it remember them for its main copy."""
    quantizer = param._get_quantizer()
    if getattr(quantizer, "amax", None) is not None:
        quantizer.amax.zero_()  # delayed scaling: of the values that Megatron had drawn
    param.copy_(values.view(param.shape))
    param._high_precision_init_val = values.view(param.shape)
