"""µP: how learning rate, initialization and logits follow the width, by optimizer. arXiv 2203.03466, 2507.08472.

Hyperparameters tuned at a base width serve at r = width/base width if a hidden matrix's step changes its spectral norm
as much as before. An element of ±1 everywhere (Adam, signs) has a spectral norm that grows by r, for gradients of low
rank; an orthogonal matrix keeps it; elements of about 1 with a flat spectrum (SOAP, Kron) grow by √r. Logits are
multiplied by 1/r by Megatron's own code (`--use-mup`), so that the output layer's initialization and learning rate stay.
"""

from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import ElementwiseOptimizer, MatrixInfo

_SPECTRAL = {"shape_scaling": 0.0, "unit_rms_norm": 0.0, "none": 0.0, "spectral": -0.5}


def hidden_exponent(optimizer: str, config: Any) -> float:
    """e in lr ∝ rᵉ for hidden matrices."""
    rules = registry.rules()
    if optimizer.endswith("_h"):
        return 0.0  # a step relative to the weight's norm
    if issubclass(rules[optimizer], ElementwiseOptimizer) or optimizer == "adam_mini":
        return -1.0
    if optimizer in ("muon", "scion"):
        return _SPECTRAL[config.scale_mode]
    if optimizer == "shampoo" and config.grafting == "none":
        return 0.0
    if optimizer in ("soap", "kron", "shampoo"):
        return -0.5  # whitened: a flat spectrum with elements of about 1
    raise UserError(f"it is not known how {optimizer}'s learning rate follows the width; train without a base width.")


def lr_multiplier(optimizer: str, config: Any, info: MatrixInfo, ratio: float) -> float:
    """Factor on the learning rate at r = `ratio`: hidden matrices and routers by the exponent, others as they are."""
    if ratio == 1.0 or info.kind not in ("hidden", "router"):
        return 1.0
    return ratio ** hidden_exponent(optimizer, config)


def init_multiplier(info: MatrixInfo, ratio: float) -> float:
    """Factor on the base width's initial standard deviation: hidden variances go by 1/fan_in."""
    return ratio**-0.5 if info.kind in ("hidden", "router") else 1.0
