"""Element-wise rules written in plain torch: their own file gives the direction, the fused kernel takes the step."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import multi_tensor
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers.base import Cost, ElementwiseOptimizer, Reducer, State, Step

_AT_ONCE = 2**24  # elements whose directions are held at a time


class DirectionOptimizer(ElementwiseOptimizer):
    """A subclass names its states, fp32 of the parameter's shape, and computes u; weights, decay and bf16 copies are moved here."""

    moved: ClassVar[int]  # numbers that `direction` reads and writes for one element

    def direction(self, grad: Tensor, state: State, step: int) -> Tensor:
        """u of one piece, in memory of its own, from the scaled gradient; states change in place."""
        raise NotImplementedError

    def displacement(self, param: Tensor, grad: Tensor, state: State, how: Step) -> Tensor:
        """What the kernel takes as the direction."""
        return self.direction(grad, state, how.number)

    def applied(self, how: Step) -> tuple[Coefficients, bool]:
        """With which rate and decay the kernel applies it, and whether its decay is cautious."""
        return Coefficients(lr=how.lr, decay_factor=how.decay_factor), how.cautious_decay

    def init_state(self, param: Tensor) -> State:
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        like: dict[str, Any] = {"dtype": dtype, "memory_format": torch.contiguous_format}
        return {key: torch.zeros_like(param, **like) for key in self.state_keys}

    def apply(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], how: Step, reducer: Reducer
    ) -> None:
        c, cautious = self.applied(how)
        first, elements = 0, 0
        for last, param in enumerate(params, 1):
            elements += param.numel()
            if elements < _AT_ONCE and last < len(params):
                continue
            directions = [
                self.displacement(param, grad.to(state[self.state_keys[0]].dtype) * how.grad_scale, state, how)
                for param, grad, state in zip(params[first:last], grads[first:last], states[first:last])
            ]
            copies = how.copies[first:last]
            multi_tensor.update(
                UpdateKind.APPLY, params[first:last], directions, (), c, copies=copies, cautious_decay=cautious
            )
            first, elements = last, 0

    def cost(self, numel: int) -> Cost:
        """The gradient scaled (read, written), the direction's passes, then parameter in and out and direction in."""
        return Cost(elementwise_bytes=4.0 * (5 + self.moved) * numel, state_bytes=4.0 * len(self.state_keys) * numel)


class DisplacementOptimizer(DirectionOptimizer):
    """A rule whose rate is its own: `displacement` is p before minus p after the step, decay with it."""

    def displacement(self, param: Tensor, grad: Tensor, state: State, how: Step) -> Tensor:
        raise NotImplementedError

    def applied(self, how: Step) -> tuple[Coefficients, bool]:
        return Coefficients(lr=1.0, decay_factor=0.0), False

    @staticmethod
    def decayed(param: Tensor, direction: Tensor, how: Step) -> Tensor:
        """What decay takes of p (lr·wd·p where it is decoupled); `direction` has the sign of the step."""
        lost = how.decay_factor * param.to(direction.dtype)
        return lost * (direction * param >= 0) if how.cautious_decay else lost
