"""State of one optimizer from another's: momentum at the right scale, curvature rebuilt; no process group in sight.

Between any two rules stand Adam's moments: m, an average of gradients g with weights that sum to one, and v, an average
of g². Each rule says what of its state these are (`moments_of`) and what state follows from them (`fill`).
"""

from typing import Any

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.kernels import quantize
from megatron_opt.migrate import kronecker
from megatron_opt.optimizers.adam_mini import AdamMini
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer, State
from megatron_opt.optimizers.hyperball import Hyperball
from megatron_opt.optimizers.kl_shampoo import KlShampoo
from megatron_opt.optimizers.kron import Kron
from megatron_opt.optimizers.muon import SpectralOptimizer
from megatron_opt.optimizers.narrow import NarrowOptimizer, widened
from megatron_opt.optimizers.shampoo import Shampoo
from megatron_opt.optimizers.soap import Soap

_ELEMENTWISE = ("adamw", "nadamw", "cautious", "mars", "lion", "signum", "sophia")


def check(name: str, optimizer: Any, source: bool = False) -> None:
    """Raise UserError where a rule's state cannot be filled, or, for a `source`, not be read."""
    inner = _inner(optimizer)
    kinds = (SpectralOptimizer, Soap, Shampoo, AdamMini, Kron)
    whole = isinstance(inner, kinds) and not isinstance(
        inner, KlShampoo
    )  # it keeps no squares, and bases of other factors
    known = whole if isinstance(optimizer, MatrixOptimizer) else False
    if not known and getattr(inner, "name", name) not in _ELEMENTWISE:
        raise UserError(
            f"a warm start to or from {name} is not possible: its state does not follow from Adam's moments; "
            "start its state anew by --no-load-optim, with a warmup."
        )
    if source and isinstance(inner, Kron):
        raise UserError(
            f"a warm start from {name} is not possible: its momentum is of normalized gradients and it keeps no squares; "
            "start the new state by --no-load-optim, with a warmup."
        )


RATE_SHARE = (
    2 / 3
)  # of the tuned rate times what the old schedule had left: more lifts the loss by over 1% (docs/migration.md)


def rewarm_steps(left: int) -> int:
    """Steps of warmup after a switch with `left` steps to go (0: unknown): a fortieth, 20 at least, half of them at most.

    docs/migration.md has the runs behind this.
    """
    steps = max(20, left // 40)
    return min(steps, left // 2) if left else steps


def _inner(optimizer: Any) -> Any:
    """The rule that Hyperball wraps, or an element-wise rule inside a matrix rule; else the rule itself."""
    optimizer = optimizer.inner if isinstance(optimizer, Hyperball) else optimizer
    return getattr(optimizer, "inner", optimizer)


def rank_one(m: Tensor, momentum: float) -> Tensor:
    """v where only m is known: E[m²] = E[g²]·(1−μ)/(1+μ) for gradients that are mostly noise, and a matrix of row means
    times column means, as one entry's m² alone is no estimate (arXiv 1804.04235).
    """
    squares = m.square() * ((1 + momentum) / (1 - momentum))
    if squares.ndim != 2:
        return squares.mean().expand_as(squares).clone()
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    return rows * columns / squares.mean().clamp_min(torch.finfo(m.dtype).tiny)


# Spectral rules: Muon, Scion


def _gain(optimizer: SpectralOptimizer) -> float:
    """What a constant gradient of 1 becomes in the momentum: 1/(1 − μ) for a sum, 1 for an average."""
    return 1 / (1 - optimizer.config.momentum) if getattr(optimizer.config, "momentum_form", "ema") == "sum" else 1.0


def _spectral_moments(optimizer: SpectralOptimizer, state: State) -> tuple[Tensor, Tensor]:
    buffer = state["momentum_buffer"]
    if buffer.dtype == torch.int8:
        buffer = quantize.decode_signed(buffer, state["momentum_absmax"])
    m = buffer.float() / _gain(optimizer)
    return m, rank_one(m, optimizer.config.momentum)


def _fill_spectral(optimizer: SpectralOptimizer, state: State, m: Tensor) -> None:
    buffer, value = state["momentum_buffer"], m * _gain(optimizer)
    if buffer.dtype == torch.int8:
        state["momentum_absmax"].copy_(quantize.block_absmax(value))
        value = quantize.encode_signed(value, state["momentum_absmax"])
    buffer.copy_(value)


# Both ways, by kind of rule; `tokens` is what one gradient of the source was the mean over


def moments_of_matrix(optimizer: Any, info: MatrixInfo, state: State, tokens: float = 1.0) -> tuple[Tensor, Tensor]:
    """(m, v) of a whole matrix from its state, in fp32."""
    optimizer = _inner(optimizer)
    if isinstance(optimizer, NarrowOptimizer):
        with widened([state], torch.float32) as (wide,):
            return _wide_moments(optimizer, info, wide, tokens)
    return _wide_moments(optimizer, info, state, tokens)


def _wide_moments(optimizer: Any, info: MatrixInfo, state: State, tokens: float) -> tuple[Tensor, Tensor]:
    if isinstance(optimizer, SpectralOptimizer):
        return _spectral_moments(optimizer, state)
    if isinstance(optimizer, Soap):
        return kronecker.soap_moments(optimizer, info, state)
    if isinstance(optimizer, Shampoo):
        return kronecker.shampoo_moments(optimizer, info, state)
    if isinstance(optimizer, AdamMini):
        m = state["exp_avg"].float()
        blocks = state["exp_avg_sq"].float().view(-1, 1)
        return m, blocks.expand(-1, m.numel() // len(blocks)).reshape(m.shape)
    return moments_of_elements(optimizer, state, tokens)


def fill_matrix(optimizer: Any, info: MatrixInfo, state: State, m: Tensor, v: Tensor, tokens: float = 1.0) -> None:
    """State of a whole matrix from its moments, in place; a Hyperball radius stays that of the current weights."""
    optimizer = _inner(optimizer)
    if isinstance(optimizer, NarrowOptimizer):
        with widened([state], torch.float32) as (wide,):
            return _fill_wide(optimizer, info, wide, m, v, tokens)
    return _fill_wide(optimizer, info, state, m, v, tokens)


def _fill_wide(optimizer: Any, info: MatrixInfo, state: State, m: Tensor, v: Tensor, tokens: float) -> None:
    if isinstance(optimizer, SpectralOptimizer):
        _fill_spectral(optimizer, state, m)
    elif isinstance(optimizer, Soap):
        kronecker.fill_soap(optimizer, info, state, m, v)
    elif isinstance(optimizer, Shampoo):
        kronecker.fill_shampoo(optimizer, info, state, m, v)
    elif isinstance(optimizer, Kron):
        kronecker.fill_kron(optimizer, info, state, m, v)
    elif isinstance(optimizer, AdamMini):
        state["exp_avg"].copy_(m)
        second = state["exp_avg_sq"]
        second.copy_(v.reshape(len(second), -1).mean(1).view_as(second))
    else:
        fill_elements(optimizer, state, m, v, tokens)


def moments_of_elements(optimizer: Any, state: State, tokens: float = 1.0) -> tuple[Tensor, Tensor]:
    """(m, v) of a slice; where a rule keeps no squares, v is even over the slice."""
    m = state["exp_avg"].float()
    if "exp_avg_sq" in state:
        return m, state["exp_avg_sq"].float()
    if "hessian" in state:
        return m, m.square() + state["hessian"].float() / tokens
    beta: float = optimizer.config.beta2 if optimizer.name == "lion" else optimizer.config.beta1
    return m, rank_one(m.view(-1), beta).view_as(m)


def fill_elements(optimizer: Any, state: State, m: Tensor, v: Tensor, tokens: float = 1.0) -> None:
    """State of a slice from its moments; Mars' last gradient is taken to be the mean one.

    Sophia's h is tokens·(v − m²), the variance of one token's gradient: the Fisher matrix's diagonal on the true labels,
    which its estimates on labels drawn from the model take over.
    """
    curvature = (v - m.square()).clamp_min(0) * tokens
    for key, value in (("exp_avg", m), ("exp_avg_sq", v), ("prev_grad", m), ("hessian", curvature)):
        if key in state:
            state[key].copy_(value.view_as(state[key]))
