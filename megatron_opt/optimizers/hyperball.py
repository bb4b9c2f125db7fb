"""Hyperball: any rule with steps and weights on spheres. arXiv 2606.16899.

R = ‖W₀‖_F per logical matrix, fixed; W ← R·N(W − η·R·N(u)), N(x) = x/‖x‖_F. The learning rate is a relative step,
about √(lr·wd) of the wrapped rule's own; weight decay means nothing here and is refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.optimizers import elementwise
from megatron_opt.optimizers.ademamix import AdEMAMix
from megatron_opt.optimizers.adopt import Adopt
from megatron_opt.optimizers.base import (
    Cost,
    ElementwiseOptimizer,
    MatrixInfo,
    MatrixOptimizer,
    Scalars,
    State,
    StateKind,
    StateSpec,
    norm_of,
)
from megatron_opt.optimizers.dion import Dion
from megatron_opt.optimizers.dion2 import Dion2, Dion3
from megatron_opt.optimizers.kl_shampoo import KlShampoo
from megatron_opt.optimizers.kl_soap import KlSoap
from megatron_opt.optimizers.kron import Kron
from megatron_opt.optimizers.muon import Muon
from megatron_opt.optimizers.partition import Partition
from megatron_opt.optimizers.registry import register
from megatron_opt.optimizers.scion import Scion
from megatron_opt.optimizers.shampoo import Shampoo
from megatron_opt.optimizers.soap import Soap
from megatron_opt.optimizers.soap_muon import SoapMuon

_FLOOR = 1e-10


class ElementwiseDirection(MatrixOptimizer):
    """An element-wise rule's direction u on whole matrices: one step of size 1 from zero."""

    vectors = True

    def __init__(self, inner: ElementwiseOptimizer) -> None:
        super().__init__(inner.config)
        self.inner = inner

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        return self.inner.init_state(weight)

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        whole = dict.fromkeys(self.inner.state_keys, StateKind.MATRIX)
        scales = [key for key in self.init_state(torch.empty(1, device="meta"), info) if key not in whole]
        return whole | dict.fromkeys(scales, StateKind.SHARED)

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        moved = [torch.zeros_like(grad) for grad in grads]
        self.inner.update(moved, grads, states, step, 1.0, 0.0)
        return [direction.neg_() for direction in moved]

    def cost(self, info: MatrixInfo) -> Cost:
        return self.inner.cost(torch.Size(info.shape).numel())

    def partition(self, info: MatrixInfo) -> Partition | None:
        """Shards of the longer side need nothing of each other, unless the rule sums over the matrix or rounds by place."""
        if isinstance(self.inner, elementwise.Cautious) or getattr(self.config, "state_dtype", "fp32") != "fp32":
            return None
        return Partition(self, info, shard_dim=int(len(info.shape) == 2 and info.shape[1] > info.shape[0]))


class Hyperball(MatrixOptimizer):
    """W ← R·N(W − η·R·N(u)) with u of the rule named before `_h`."""

    inner_class: ClassVar[type]
    clip: ClassVar[bool] = True
    projects: ClassVar[bool] = True
    scalars: ClassVar[Scalars] = Scalars("adamw", 1.0, {"beta1": 0.9, "beta2": 0.98, "eps": 1e-10})  # the study's

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inner = self.inner_class(config)
        self.inner = inner if isinstance(inner, MatrixOptimizer) else ElementwiseDirection(inner)
        self.vectors = self.inner.vectors  # type: ignore[misc]

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        state = self.inner.init_state(weight, info) | {"radius": norm_of(weight)}
        self.check_state(state, info)
        return state

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        return self.inner.state_spec(info) | {"radius": StateKind.NORM}

    def check_state(self, state: State, info: MatrixInfo) -> None:
        if not state["radius"] > 0:
            raise UserError(
                f"{info.name} starts at zero, and {self.name} would keep it there; give it another initialization "
                "or another optimizer (--optimizer-groups)."
            )

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        directions = self.inner.update(grads, states, step, infos)
        for u, state in zip(directions, states):
            u.mul_(state["radius"] / torch.linalg.vector_norm(u).clamp_min(_FLOOR))
        return directions

    def projection(self, squared_norm: Tensor, state: State) -> Tensor:
        """R/‖W‖."""
        return state["radius"][0] / squared_norm.sqrt().clamp_min(_FLOOR)

    def width_exponent(self) -> float:
        """A step relative to the weight's norm."""
        return 0.0

    def cost(self, info: MatrixInfo) -> Cost:
        return self._with_norms(self.inner.cost(info), torch.Size(info.shape).numel())

    def _with_norms(self, cost: Cost, numel: float) -> Cost:
        """Besides, two norms and two scalings, and the radius."""
        moved = cost.elementwise_bytes + 4.0 * 6 * numel
        return replace(cost, elementwise_bytes=moved, state_bytes=cost.state_bytes + 4.0)

    def partition(self, info: MatrixInfo) -> Partition | None:
        """The inner rule's."""
        inner = self.inner.partition(info)
        return inner and replace(inner, surcharge=self._with_norms)


_WRAPPED: tuple[type, ...] = (
    Muon,
    Scion,
    Soap,
    Kron,
    Shampoo,
    elementwise.NAdamW,
    elementwise.Cautious,
    elementwise.Lion,
    elementwise.Signum,
    AdEMAMix,
    Adopt,
    KlSoap,
    KlShampoo,
    SoapMuon,
    Dion,
    Dion2,
    Dion3,
)


def _wrap(inner: type, name: str) -> None:
    """Registers Hyperball of a rule, and names it in this module, where pickle looks for it."""
    body = {"name": name, "Config": inner.Config, "inner_class": inner, "__doc__": Hyperball.__doc__}  # type: ignore[attr-defined]
    cls = type(f"{inner.__name__}Hyperball", (Hyperball,), body | {"__module__": __name__})
    globals()[cls.__name__] = register(cls)


_wrap(elementwise.AdamW, "adam_h")
for _inner in _WRAPPED:
    _wrap(_inner, f"{_inner.name}_h")  # type: ignore[attr-defined]
