"""One fused multi-tensor update for the whole element-wise family, and the sums that some of its rules need
first.

p ← (p − lr·u − decay_factor·p)·factor with the direction u of a rule; rules and coefficients are those of
csrc/include/updates.h, here beside their reference in plain torch.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_opt.kernels import philox, quantize
from megatron_opt.kernels.dispatch import Operation

Tensors = Sequence[Tensor]


class UpdateKind(IntEnum):
    """Directions; the comment gives the states."""

    ADAM = 0  # m, v
    MARS = 1  # m, v, previous gradient
    CAUTIOUS = 2  # m, v
    LION = 3  # m
    SIGNUM = 4  # m
    SOPHIA = 5  # m, h (read only)
    MOMENTUM = 6  # m; u goes to `copies`, parameters are not touched
    APPLY = 7  # no state; the gradient is the direction


class Sum(IntEnum):
    """Read-only sums, three a tensor; what is not named is 0."""

    GRADIENT_NORM = 0  # Σg², number of Inf and NaN
    CAUTIOUS_MASK = 1  # number of elements Cautious keeps; state0 is m
    MARS_NORM = 2  # Σc²; state0 is the previous gradient
    PRODUCTS = 3  # Σp², Σp·u, Σu²; the gradient is u


class Coefficients(NamedTuple):
    """What a step's arithmetic needs beyond the tensors; the order of csrc/include/launch.h."""

    lr: float = 1.0
    decay_factor: float = 0.0  # weight decay of this step: lr·wd where it is decoupled
    grad_scale: float = 1.0  # multiplies the gradient
    beta1: float = 0.0
    input_weight1: float = 1.0  # share of g that enters the first state
    beta2: float = 0.0
    input_weight2: float = 1.0
    eps: float = 0.0
    momentum_weight: float = 1.0  # u's numerator is momentum_weight·m + gradient_weight·g
    gradient_weight: float = 0.0
    inv_sqrt_correction2: float = 1.0  # 1/√(1 − β2^t)
    gamma: float = 0.0  # Mars: γβ1/(1 − β1); Sophia: γ


def _agree(a: Tensor, b: Tensor) -> Tensor:
    return (torch.sign(a) * torch.sign(b)) > 0


def _adam(g: Tensor, m: Tensor, v: Tensor, c: Coefficients) -> Tensor:
    m.mul_(c.beta1).add_(c.input_weight1 * g)
    v.mul_(c.beta2).add_(c.input_weight2 * g * g)
    return (c.momentum_weight * m + c.gradient_weight * g) / (v.sqrt() * c.inv_sqrt_correction2 + c.eps)


def _cautious_mask(g: Tensor, m: Tensor, c: Coefficients) -> Tensor:
    following = c.beta1 * m + c.input_weight1 * g
    return _agree(c.momentum_weight * following + c.gradient_weight * g, g)


def _mars_correction(g: Tensor, previous: Tensor, c: Coefficients) -> Tensor:
    return g + c.gamma * (g - previous)


def _direction(kind: UpdateKind, g: Tensor, states: list[Tensor], scale: Tensor | float, c: Coefficients) -> Tensor:
    """Direction of one tensor; `states` change in place. All in one floating type."""
    if kind == UpdateKind.ADAM:
        return _adam(g, states[0], states[1], c)
    if kind == UpdateKind.MARS:
        corrected = _mars_correction(g, states[2], c) * scale
        states[2].copy_(g)
        return _adam(corrected, states[0], states[1], c)
    if kind == UpdateKind.CAUTIOUS:
        mask = _cautious_mask(g, states[0], c)
        return _adam(g, states[0], states[1], c) * torch.where(mask, scale, 0.0)
    if kind == UpdateKind.APPLY:
        return g * scale
    m = states[0]
    if kind == UpdateKind.LION:
        u = torch.sign(c.beta1 * m + c.input_weight1 * g)
        m.mul_(c.beta2).add_(c.input_weight2 * g)
        return u
    m.mul_(c.beta1).add_(c.input_weight1 * g)
    if kind == UpdateKind.SOPHIA:
        return (c.momentum_weight * m / torch.clamp(c.gamma * states[1], min=c.eps)).clamp(-1.0, 1.0)
    u = c.momentum_weight * m + c.gradient_weight * g
    return torch.sign(u) if kind == UpdateKind.SIGNUM else u


_STATES = {
    UpdateKind.ADAM: 2,
    UpdateKind.MARS: 3,
    UpdateKind.CAUTIOUS: 2,
    UpdateKind.SOPHIA: 2,
    UpdateKind.APPLY: 0,
}  # others: 1


def _check(lists: dict[str, Tensors], grads: Tensors) -> None:
    for name, tensors in lists.items():
        for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
            if not tensor.is_contiguous():
                raise RuntimeError(f"{name}[{i}] is not contiguous.")
            if tensor.numel() != grad.numel():
                raise RuntimeError(f"{name}[{i}] has {tensor.numel()} elements instead of {grad.numel()}.")
            if tensor.device != grads[0].device:
                raise RuntimeError(f"{name}[{i}] is on {tensor.device}, grads[0] on {grads[0].device}.")


def _open(x: Tensor, absmax: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A flat tensor in the type of the arithmetic: the tensor's own memory where types agree."""
    if absmax is not None and not x.is_floating_point():
        return quantize.decode(x, absmax).view(-1)
    return x.detach().view(-1).to(dtype)


def _close(value: Tensor, x: Tensor, absmax: Tensor | None, draw: Callable[[], Tensor] | None) -> None:
    """Writes a value back to its tensor, rounding as its type asks; `draw` where rounding is stochastic."""
    target = x.detach().view(-1)
    if x.dtype == torch.bfloat16 and draw is not None:
        bits = (value.view(torch.int32).long() & 0xFFFFFFFF) + (draw() >> 16)
        rounded = (bits >> 16 << 16).to(torch.int32).view(torch.float32).bfloat16()
        target.copy_(torch.where(value.isfinite(), rounded, value.bfloat16()))
    elif absmax is not None and not x.is_floating_point():
        absmax.copy_(quantize.block_absmax(value))
        if x.dtype == torch.int8:
            target.copy_(quantize.encode_signed(value, absmax, None if draw is None else draw()))
        else:
            assert draw is not None
            target.copy_(quantize.encode_unsigned(value, absmax, draw()))
    elif value.data_ptr() != target.data_ptr():
        target.copy_(value)


@torch.no_grad()
def _update_reference(
    kind: int,
    params: Tensors,
    grads: Tensors,
    state0: Tensors,
    state1: Tensors,
    state2: Tensors,
    copies: Tensors,
    absmax0: Tensors,
    absmax1: Tensors,
    scales: Tensor | None,
    coefficients: Sequence[float],
    device_coefficients: Tensor | None,
    cautious_decay: bool,
    stochastic: bool,
    seed: int,
    step: int,
    element_offsets: Sequence[int],
    with_sums: bool,
) -> Tensor:
    kind = UpdateKind(kind)
    values = coefficients if device_coefficients is None else device_coefficients.tolist()
    c = Coefficients(*values)
    count, writes_output = len(grads), kind == UpdateKind.MOMENTUM
    states = [state0, state1, state2][: _STATES.get(kind, 1)]
    lists = {"grads": grads, "copies": copies} if copies else {"grads": grads}
    _check(lists | {f"states[{k}]": s for k, s in enumerate(states)}, grads)
    if not writes_output:
        _check({"params": params}, grads)
    sums = grads[0].new_zeros((count if with_sums else 0, 3), dtype=torch.float64) if grads else torch.zeros(0, 3)
    absmax = [absmax0, absmax1, ()]
    following = 0
    for i, grad in enumerate(grads):
        first = element_offsets[i] if element_offsets else following
        following += grad.numel()
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        raw = _open(grad, None, dtype)
        blocks = [a[i] if a else None for a in absmax]
        opened = [_open(s[i], blocks[k], dtype) for k, s in enumerate(states)]
        scale = scales.view(-1, 2)[i, 0] if scales is not None else 1.0
        u = _direction(kind, raw * c.grad_scale, opened, scale, c)

        def draw(slot: int, first: int = first, grad: Tensor = grad) -> Callable[[], Tensor]:
            return lambda: philox.draws(seed, step, slot, first, grad.numel(), grad.device)

        for k, state in enumerate(states):
            if kind == UpdateKind.SOPHIA and k == 1:
                continue
            noisy = stochastic or state[i].dtype == torch.uint8
            _close(opened[k], state[i], blocks[k], draw(2 + k) if noisy else None)
        if with_sums:
            sums[i, 0] = raw.double().square().sum()
            sums[i, 1] = (~raw.isfinite()).sum()
        if writes_output:
            _close(u, copies[i], None, None)
            if with_sums:
                sums[i, 2] = u.double().square().sum()
            continue
        p = _open(params[i], None, dtype)
        decay = (
            c.decay_factor * p
            if not cautious_decay
            else torch.where(u * p >= 0, c.decay_factor * p, torch.zeros_like(p))
        )
        p = p - (c.lr * u + decay)
        if scales is not None:
            p = p * scales.view(-1, 2)[i, 1]
        _close(p, params[i], None, draw(0) if stochastic else None)
        if copies:
            _close(p, copies[i], None, None)
    return sums


@torch.no_grad()
def _sum_reference(
    kind: int,
    params: Tensors,
    grads: Tensors,
    state0: Tensors,
    absmax0: Tensors,
    coefficients: Sequence[float],
) -> Tensor:
    kind, c = Sum(kind), Coefficients(*coefficients)
    _check({"grads": grads}, grads)
    sums = torch.zeros(len(grads), 3, dtype=torch.float64, device=grads[0].device if grads else None)
    for i, grad in enumerate(grads):
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        g = _open(grad, None, dtype) * c.grad_scale
        if kind == Sum.GRADIENT_NORM:
            sums[i, 0], sums[i, 1] = g.double().square().sum(), (~g.isfinite()).sum()
        elif kind == Sum.PRODUCTS:
            p, u = _open(params[i], None, dtype).double(), g.double()
            sums[i, 0], sums[i, 1], sums[i, 2] = p.square().sum(), (p * u).sum(), u.square().sum()
        else:
            state = _open(state0[i], absmax0[i] if absmax0 else None, dtype)
            if kind == Sum.CAUTIOUS_MASK:
                sums[i, 0] = _cautious_mask(g, state, c).sum()
            else:
                sums[i, 0] = _mars_correction(g, state, c).double().square().sum()
    return sums


_update = Operation(
    "multi_tensor_update",
    "(int kind, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state0, Tensor(c!)[] state1, "
    "Tensor(d!)[] state2, Tensor(e!)[] copies, Tensor(f!)[] absmax0, Tensor(g!)[] absmax1, Tensor? scales, "
    "float[] coefficients, Tensor? device_coefficients, bool cautious_decay, bool stochastic, int seed, "
    "int step, int[] element_offsets, "
    "bool with_sums) -> Tensor",
    _update_reference,
    lambda kind, params, grads, *rest: grads[0].new_empty((len(grads) if rest[-1] else 0, 3), dtype=torch.float64),
)
_sum = Operation(
    "multi_tensor_sum",
    "(int kind, Tensor[] params, Tensor[] grads, Tensor[] state0, Tensor[] absmax0, float[] coefficients) -> Tensor",
    _sum_reference,
    lambda kind, params, grads, *rest: grads[0].new_empty((len(grads), 3), dtype=torch.float64),
)


def _native(grads: Tensors) -> bool:
    """Double precision takes the reference."""
    return grads[0].dtype != torch.float64


def update(
    kind: UpdateKind,
    params: Tensors,
    grads: Tensors,
    states: Sequence[Tensors],
    coefficients: Coefficients,
    *,
    copies: Tensors = (),
    absmax: Sequence[Tensors] = ((), ()),
    scales: Tensor | None = None,
    device_coefficients: Tensor | None = None,
    cautious_decay: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    element_offsets: Sequence[int] = (),
    with_sums: bool = False,
) -> Tensor:
    """One step of `rule` on many contiguous tensors, in place; fp32 and bf16 may be mixed at will.

    `states` are the rule's state lists; 8-bit ones (int8 for signed, uint8 for non-negative) come with block
    maxima in `absmax`. `copies` are bf16 copies of the new parameters, or the outputs of UpdateKind.MOMENTUM.
    `scales` (n, 2) fp32 has the rule's scale and a factor on the new parameter for each tensor.
    `device_coefficients` (12,) fp32 on the tensors' device replaces `coefficients`, so that a captured CUDA
    graph can be replayed with others. `stochastic` rounds bf16 parameters and states and int8 states by bits
    drawn from (seed, step, element number); `element_offsets` numbers each tensor's first element. Returns Σg², the
    count of Inf and NaN in g, and Σu² where u is an output: (n, 3) fp64, or (0, 3) without `with_sums`.
    Raises RuntimeError on tensors that are not contiguous or do not fit together.
    """
    if not grads:
        return torch.zeros(0, 3, dtype=torch.float64)
    state0, state1, state2 = [*states, (), (), ()][:3]
    arguments = (
        *(
            int(kind),
            params,
            grads,
            state0,
            state1,
            state2,
            copies,
            absmax[0],
            absmax[1],
            scales,
            coefficients,
        ),
        *(device_coefficients, cautious_decay, stochastic, seed, step, element_offsets, with_sums),
    )
    if not _native(grads):
        return _update.reference(*arguments)
    return _update(grads[0].device, *arguments)


def sums(
    kind: Sum,
    grads: Tensors,
    coefficients: Coefficients,
    *,
    params: Tensors = (),
    states: Tensors = (),
    absmax: Tensors = (),
) -> Tensor:
    """Three sums a tensor, (n, 3) fp64, the same for any number of threads; see `Sum`."""
    if not grads:
        return torch.zeros(0, 3, dtype=torch.float64)
    arguments = (int(kind), params, grads, states, absmax, coefficients)
    return _sum.reference(*arguments) if not _native(grads) else _sum(grads[0].device, *arguments)
