"""Parameters that are Transformer Engine's quantized tensors: bytes and scales that say bf16, and have no flat view."""

from collections.abc import Mapping, Sequence
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
    forget_amax(param)  # of the values that Megatron had drawn
    param.copy_(values.view(param.shape))
    param._high_precision_init_val = values.view(param.shape)


def forget_amax(param: Any) -> None:
    """Delayed scaling: what is quantized next is all of the parameter that enters its history."""
    amax = getattr(param._get_quantizer(), "amax", None)
    if amax is not None:
        amax.zero_()


def loaded_values(chunks: Sequence[Any], state_dict: Mapping[str, Any]) -> dict[int, Tensor]:
    """What a checkpoint holds of each quantized parameter, flat, by the parameter's id: not yet rounded to FP8.

    `state_dict`: Megatron's, that the model was loaded from.
    """
    from megatron.core.utils import unwrap_model

    found: dict[int, Tensor] = {}
    for index, chunk in enumerate(unwrap_model(list(chunks))):
        values = state_dict["model" if len(chunks) == 1 else f"model{index}"]
        for name, param in chunk.named_parameters():
            if is_quantized(param):
                assert not is_quantized(values[name]), "a main copy would start from FP8"
                found[id(param)] = values[name].detach().reshape(-1)
    return found
