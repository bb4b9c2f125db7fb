"""SOAP-Muon: SOAP's direction, orthogonalized as Muon's momentum is.

github.com/nikhilvyas/SOAP_MUON, and track 3 of modded-nanogpt (its pull request 278). Not in arXiv 2607.20548, which
compares the two rules apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.optimizers.base import Cost, MatrixInfo, Scalars, State
from megatron_opt.optimizers.muon import SCALE_MODES, Muon, shape_scale
from megatron_opt.optimizers.options import OptionError, choice, option
from megatron_opt.optimizers.partition import Partition
from megatron_opt.optimizers.registry import register
from megatron_opt.optimizers.soap import Soap, SoapConfig

_EPS = 1e-7  # added to the norm of SOAP's direction, whose elements are about 1


@dataclass(frozen=True)
class SoapMuonConfig(SoapConfig):
    """Hyperparameters of SOAP-Muon: SOAP's, as tuned in the study, and Muon's iteration."""

    precondition_1d: bool = option(False, "true is refused: vectors are another rule's")
    scale_mode: str = choice("shape_scaling", SCALE_MODES, "factor by the matrix's shape (out, in)")
    extra_scale_factor: float = option(1.0, "further factor on the update", above=0, high=1e6)
    num_ns_steps: int = option(5, "Newton–Schulz steps", low=1, high=100)
    coefficient_type: str = choice("simple", tuple(ns.SETS), "Newton–Schulz coefficients")
    fp32_matmul_prec: str = choice("medium", tuple(ns.ITERATION_DTYPES), "iterate in bf16 (medium) or fp32")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precondition_1d:
            raise OptionError("precondition_1d", "has no effect: this rule takes matrices alone; leave it out.")


@register
class SoapMuon(Soap):
    """u = √max(1, out/in)·NS(u_SOAP/(‖u_SOAP‖_F + ε)): SOAP's direction of the whole matrix, from blocks or one, orthogonalized."""

    name: ClassVar[str] = "soap_muon"
    Config: ClassVar[type] = SoapMuonConfig
    clip: ClassVar[bool] = False  # steps have one length, whatever the gradient's
    vectors: ClassVar[bool] = False
    scalars: ClassVar[Scalars] = Muon.scalars  # steps are Muon's

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = ns.coefficients(config.coefficient_type, config.num_ns_steps)

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        if len(info.shape) != 2:
            raise UserError(
                f"{self.name} needs matrices, {info.name} has shape {info.shape}; route it to another optimizer."
            )
        return super().init_state(weight, info)

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        directions = super().directions(grads, states, step, infos)
        orthogonal = ns.orthogonalize(directions, self.table, _EPS, self.config.fp32_matmul_prec, "add")
        factors = [self.config.extra_scale_factor * shape_scale(info.shape, self.config.scale_mode) for info in infos]
        return [x if factor == 1.0 else x.mul_(factor) for x, factor in zip(orthogonal, factors)]

    def parts(self, info: MatrixInfo) -> Partition | None:
        """Whole: what is orthogonalized is all of it."""
        return None

    def width_exponent(self) -> float:
        """Muon's: an orthogonal matrix keeps its spectral norm."""
        return -0.5 if self.config.scale_mode == "spectral" else 0.0

    def cost(self, info: MatrixInfo) -> Cost:
        cost, (k, K) = super().cost(info), sorted(info.shape)
        kind, iteration = "gemm" if k > 128 else "small_gemm", ns.flops(k, K, self.table, self.config.fp32_matmul_prec)
        # norm, normalized copy, scaled result
        return replace(
            cost,
            flops=cost.flops | {kind: cost.flops.get(kind, 0.0) + iteration},
            elementwise_bytes=cost.elementwise_bytes + 4.0 * 5 * k * K,
        )
