"""µP: how learning rate, initialization and logits follow the width, by optimizer. arXiv 2203.03466, 2507.08472.

Hyperparameters tuned at a base width serve at r = width/base width if a hidden matrix's step changes its spectral norm
as much as before. An element of ±1 everywhere (Adam, signs) has a spectral norm that grows by r, for gradients of low
rank; an orthogonal matrix keeps it; elements of about 1 with a flat spectrum (SOAP, Kron) grow by √r. Logits are
multiplied by 1/r by Megatron's own code (`--use-mup`), so that the output layer's initialization and learning rate stay.
"""

from megatron_opt.optimizers.base import ElementwiseOptimizer, MatrixInfo, MatrixOptimizer


def lr_multiplier(optimizer: MatrixOptimizer | ElementwiseOptimizer, info: MatrixInfo, ratio: float) -> float:
    """Factor on the learning rate at r = `ratio`: hidden matrices and routers by the exponent, others as they are."""
    if ratio == 1.0 or info.kind not in ("hidden", "router"):
        return 1.0
    return float(ratio ** optimizer.width_exponent())


def init_multiplier(info: MatrixInfo, ratio: float) -> float:
    """Factor on the base width's initial standard deviation: hidden variances go by 1/fan_in."""
    return ratio**-0.5 if info.kind in ("hidden", "router") else 1.0
