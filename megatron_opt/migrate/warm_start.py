"""State of one optimizer from another's: momentum at the right scale, curvature rebuilt; no process group in sight.

Between any two rules stand Adam's moments: m, an average of gradients g with weights that sum to one, and v, an average
of g². Each rule says what of its state these are (`moments_of`) and what state follows from them (`fill`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer, State
from megatron_opt.optimizers.blocks import as_matrix
from megatron_opt.optimizers.hyperball import Hyperball
from megatron_opt.optimizers.muon import SpectralOptimizer
from megatron_opt.optimizers.soap import Soap

_ELEMENTWISE = ("adamw", "nadamw", "cautious", "mars", "lion", "signum")


def supported(name: str, rule: Any) -> bool:
    """Whether a rule's state can be read and filled."""
    if isinstance(rule, MatrixOptimizer):
        return isinstance(_inner(rule), (SpectralOptimizer, Soap)) or getattr(_inner(rule), "name", "") in _ELEMENTWISE
    return name in _ELEMENTWISE


def refuse(names: Sequence[str]) -> UserError:
    """What is said of rules that no moments lead to."""
    return UserError(
        f"a warm start to or from {', '.join(names)} is not possible: its state does not follow from Adam's moments; "
        "start its state anew by --no-load-optim, with a warmup."
    )


def _inner(rule: Any) -> Any:
    """The rule that Hyperball wraps, or an element-wise rule inside a matrix rule; else the rule itself."""
    rule = rule.inner if isinstance(rule, Hyperball) else rule
    return getattr(rule, "inner", rule)


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


def _gain(rule: SpectralOptimizer) -> float:
    """What a constant gradient of 1 becomes in the momentum: 1/(1 − μ) for a sum, 1 for an average."""
    return 1 / (1 - rule.config.momentum) if getattr(rule.config, "momentum_form", "ema") == "sum" else 1.0


def _spectral_moments(rule: SpectralOptimizer, state: State) -> tuple[Tensor, Tensor]:
    m = state["momentum_buffer"].float() / _gain(rule)
    return m, rank_one(m, rule.config.momentum)


# SOAP


def _rotated(v: Tensor, bases: dict[int, Tensor], back: bool = False) -> Tensor:
    """E[(Q_Lᵀ g Q_R)²] from E[g²] of independent entries: the bases' squares on both sides."""
    for side, basis in bases.items():
        weights = basis.square()
        if side == 0:
            v = (weights if back else weights.mT) @ v
        else:
            v = v @ (weights.mT if back else weights)
    return v


def _rotate(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    for side, basis in bases.items():
        x = basis.mT @ x if side == 0 else x @ basis
    return x


def _fill_soap(rule: Soap, info: MatrixInfo, state: State, m: Tensor, v: Tensor) -> None:
    """Factors E[G·Gᵀ] = m·mᵀ + diag(Σ_j var_ij) of entries with mean m and variance v − m², their eigenbases, and the
    second moment in them. The first refresh mixes in true gradients.
    """
    grid, sides = rule.grid(info), rule.sides(info)
    mean, variance = as_matrix(m), as_matrix((v - m.square()).clamp_min(0))
    seconds = []
    for region, (mu, var) in enumerate(zip(grid.cut(mean.double()), grid.cut(variance.double()), strict=True)):
        bases = {}
        for side in sides:
            outer = mu @ mu.mT if side == 0 else mu.mT @ mu
            factor = outer + torch.diag_embed(var.sum(2 if side == 0 else 1))
            basis = torch.linalg.eigh(factor).eigenvectors.flip(-1)  # largest first
            pivot = basis.gather(1, basis.abs().argmax(1, keepdim=True))
            basis = basis * torch.where(pivot < 0, -1.0, 1.0)  # one sign on every machine
            state[f"gg_{region}_{side}"].copy_(factor)
            state[f"q_{region}_{side}"].copy_(basis)
            bases[side] = basis
        seconds.append((_rotated(var, bases) + _rotate(mu, bases).square()).to(m.dtype))
    state["exp_avg"].copy_(m)
    grid.join(seconds, as_matrix(state["exp_avg_sq"]))
    state["ready"].fill_(1.0)


def _soap_moments(rule: Soap, info: MatrixInfo, state: State) -> tuple[Tensor, Tensor]:
    grid, sides = rule.grid(info), rule.sides(info)
    m, seconds = state["exp_avg"].float(), []
    for region, v in enumerate(grid.cut(as_matrix(state["exp_avg_sq"]))):
        bases = {side: state[f"q_{region}_{side}"] for side in sides}
        seconds.append(_rotated(v.float(), bases, back=True))
    second = torch.empty_like(m)
    grid.join(seconds, as_matrix(second))
    return m, second


# Both ways, by kind of rule


def moments_of_matrix(rule: Any, info: MatrixInfo, state: State) -> tuple[Tensor, Tensor]:
    """(m, v) of a whole matrix from its state, in fp32."""
    rule = _inner(rule)
    if isinstance(rule, SpectralOptimizer):
        return _spectral_moments(rule, state)
    if isinstance(rule, Soap):
        return _soap_moments(rule, info, state)
    return moments_of_elements(rule, state)


def fill_matrix(rule: Any, info: MatrixInfo, state: State, m: Tensor, v: Tensor) -> None:
    """State of a whole matrix from its moments, in place; a Hyperball radius stays that of the current weights."""
    rule = _inner(rule)
    if isinstance(rule, SpectralOptimizer):
        state["momentum_buffer"].copy_(m * _gain(rule))
    elif isinstance(rule, Soap):
        _fill_soap(rule, info, state, m, v)
    else:
        fill_elements(rule, state, m, v)


def moments_of_elements(rule: Any, state: State) -> tuple[Tensor, Tensor]:
    """(m, v) of a slice; where a rule keeps no squares, v is even over the slice."""
    m = state["exp_avg"].float()
    if "exp_avg_sq" in state:
        return m, state["exp_avg_sq"].float()
    beta: float = rule.config.beta2 if rule.name == "lion" else rule.config.beta1
    return m, rank_one(m.view(-1), beta).view_as(m)


def fill_elements(rule: Any, state: State, m: Tensor, v: Tensor) -> None:
    """State of a slice from its moments; Mars' last gradient is taken to be the mean one."""
    for key, value in (("exp_avg", m), ("exp_avg_sq", v), ("prev_grad", m)):
        if key in state:
            state[key].copy_(value.view_as(state[key]))
