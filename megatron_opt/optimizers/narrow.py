"""State kept in fewer bits than it is computed in: widened before a rule's step, rounded to the nearest after it.

Moments (tensors of the matrix's shape) in bf16, the first of them in 8-bit blocks of 2048 too (arXiv 2110.02861); factors and what
is derived from them in bf16. A moving average with 1 − β above the roundings of bf16 (2⁻⁹) does not stall by rounding to nearest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_opt.kernels import quantize
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer, State, StateKind, StateSpec
from megatron_opt.optimizers.options import choice
from megatron_opt.optimizers.partition import Partition

_NARROW = (torch.bfloat16, torch.int8)
_SCALE = "_absmax"  # maxima of an 8-bit state's blocks


def moment_option() -> Any:
    """The field `moment_dtype` of a rule's configuration."""
    meaning = "moments in fp32 or bf16; int8: the first in 8-bit blocks of 2048, others in bf16"
    return choice("fp32", ("fp32", "bf16", "int8"), meaning)


@contextmanager
def widened(states: Sequence[State], dtype: torch.dtype) -> Iterator[list[State]]:
    """States to compute with, in `dtype` where they are kept narrower; what becomes of them is rounded back at the end."""
    narrow = [[key for key, tensor in state.items() if tensor.dtype in _NARROW] for state in states]
    if not any(narrow):
        yield list(states)
        return
    wide = [
        {key: _wide(state, key, dtype) if key in keys else tensor for key, tensor in state.items()}
        for state, keys in zip(states, narrow, strict=True)
    ]
    yield wide
    for state, computed, keys in zip(states, wide, narrow, strict=True):
        for key in keys:
            if state[key].dtype == torch.int8:
                state[key + _SCALE].copy_(quantize.block_absmax(computed[key]))
                state[key].copy_(quantize.encode_signed(computed[key], state[key + _SCALE]))
            else:
                state[key].copy_(computed[key])


def _wide(state: State, key: str, dtype: torch.dtype) -> Tensor:
    if state[key].dtype == torch.int8:
        return quantize.decode_signed(state[key], state[key + _SCALE]).to(dtype)
    return state[key].to(dtype)


def is_narrow(optimizer: object) -> bool:
    """Whether some of a rule's state is widened while it steps."""
    return isinstance(optimizer, NarrowOptimizer) and (
        optimizer.config.moment_dtype != "fp32" or getattr(optimizer.config, "factor_precision", "fp32") == "bf16"
    )


class NarrowOptimizer(MatrixOptimizer):
    """A rule whose `Config` has `moment_dtype`; it computes with wide states in `directions`."""

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        """`update` with states in the gradients' dtype."""
        raise NotImplementedError

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        if not grads:
            return []
        with widened(states, grads[0].dtype) as wide:
            return self.directions(grads, wide, step, infos)

    @property
    def in_codes(self) -> bool:
        """Whether the first moment is in 8-bit blocks, which run over rows: matrices stay whole."""
        return bool(self.config.moment_dtype == "int8")

    def moments(self, weight: Tensor, keys: Sequence[str]) -> State:
        """Zeros of the weight's shape, the first key's in codes where asked."""
        wide = self.config.moment_dtype == "fp32"
        state = {key: torch.zeros_like(weight, dtype=weight.dtype if wide else torch.bfloat16) for key in keys}
        if self.in_codes:
            state[keys[0]] = torch.zeros_like(weight, dtype=torch.int8)
            state[keys[0] + _SCALE] = weight.new_zeros(quantize.blocks(weight.numel()), dtype=torch.float32)
        return state

    def moments_spec(self, keys: Sequence[str]) -> StateSpec:
        """Kinds of what `moments` makes."""
        spec = dict.fromkeys(keys, StateKind.MATRIX)
        return spec | ({keys[0] + _SCALE: StateKind.SHARED} if self.in_codes else {})

    def moment_bytes(self, numel: int, count: int = 1) -> float:
        """Bytes of `count` moments of a matrix."""
        if self.in_codes:
            return numel + 4.0 * quantize.blocks(numel) + 2.0 * numel * (count - 1)
        return (4.0 if self.config.moment_dtype == "fp32" else 2.0) * numel * count

    def with_conversion(self, cost: Cost) -> Cost:
        """A cost whose state is narrow: each of its bytes is read and written, and so are its fp32 numbers, twice each."""
        if not is_narrow(self):
            return cost
        moved = cost.elementwise_bytes + 6.0 * cost.state_bytes
        return Cost(cost.flops, cost.refresh, cost.refresh_every, moved, cost.state_bytes)

    def partition(self, info: MatrixInfo) -> Partition | None:
        return None if self.in_codes else self.parts(info)

    def parts(self, info: MatrixInfo) -> Partition | None:
        """`partition` where nothing runs over rows."""
        return None
