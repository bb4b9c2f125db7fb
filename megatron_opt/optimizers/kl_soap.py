"""KL-SOAP: SOAP in the eigenbases of KL-Shampoo's factors, each of the gradient whitened by the other. arXiv 2509.03378.

L ← β·L + (1−β)·G R⁻¹ Gᵀ/n and R ← β·R + (1−β)·Gᵀ L⁻¹ G/m minimize the Kullback-Leibler divergence between the Gaussians of
covariance E[g gᵀ] and R ⊗ L. As in NVIDIA's Emerging-Optimizers, R⁻¹ is Q diag(QᵀRQ)⁻¹ Qᵀ of the factor before the step and
the basis at hand (`variant=study`: refreshed already). Eigenvalues have absolute limits there and in the authors' code, a
relative one here.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import products
from megatron_opt.optimizers.base import Cost, MatrixInfo
from megatron_opt.optimizers.factored import Blocks, FactoredOptimizer
from megatron_opt.optimizers.options import choice, option
from megatron_opt.optimizers.partition import Partition
from megatron_opt.optimizers.registry import register
from megatron_opt.optimizers.soap import Soap, SoapConfig

_LEAST = 1e-24  # eigenvalue of a factor: no gradient's square divided by it leaves fp32


@dataclass(frozen=True)
class KlSoapConfig(SoapConfig):
    """Hyperparameters of KL-SOAP; SOAP's, as tuned in the study."""

    factor_precision: str = choice(
        "fp64",
        ("bf16", "fp32", "fp64"),
        "dtype of the factors; in fp32 layouts part by 1e-4; bf16: of bases and roots too",
    )
    power_shift: float = option(
        1e-3, "refresh from factors plus this share of their largest eigenvalue: without it frequent refreshes part by 5e-4",
        low=0, high=100,
    )  # fmt: skip
    eigenvalue_floor: float = option(
        1e-4, "least eigenvalue in the whitening, over a factor's mean: unseen directions are not blown up",
        low=1e-8, high=1,
    )  # fmt: skip


@register
class KlSoap(Soap):
    """SOAP with L ← EMA(G R⁻¹ Gᵀ/n), R ← EMA(Gᵀ L⁻¹ G/m); a side whose other one has no factor: G·Gᵀ/n."""

    name: ClassVar[str] = "kl_soap"
    Config: ClassVar[type] = KlSoapConfig

    def works_in_place(self, blocks: Blocks) -> bool:
        """The native step takes the gradient into the factors as it is."""
        return False

    def advance(self, factor: Tensor, grad: Tensor, side: int) -> None:
        """β·factor + (1−β)·g gᵀ over the other side's length (side 0), or gᵀg (side 1), in place."""
        beta, g = self.config.shampoo_beta, grad.to(factor.dtype)
        left, right = (g, g.mT) if side == 0 else (g.mT, g)
        products.accumulate(factor, left, right, (1 - beta) / g.shape[-1 - side], beta, symmetric=True)

    def advance_factors(self, blocks: Blocks) -> None:
        (grad,) = blocks.grads
        whitened = self.whitened(grad, blocks) if len(blocks.factors) == 2 else {}
        for side, (factor,) in blocks.factors.items():
            self.advance(factor, whitened.get(side, grad), side)

    def whitened(self, grad: Tensor, blocks: Blocks) -> dict[int, Tensor]:
        """The gradient (B, b, c) whitened on the other side, in its basis, for each side's factor."""
        factors = {}
        for side, (factor,) in blocks.factors.items():
            g, basis = grad.to(factor.dtype), blocks.derived[side][0].to(factor.dtype)
            roots = self.inverse_roots(factor, basis)
            factors[1 - side] = (basis.mT @ g) * roots.unsqueeze(-1) if side == 0 else (g @ basis) * roots.unsqueeze(-2)
        return factors

    def inverse_roots(self, factor: Tensor, basis: Tensor) -> Tensor:
        """(B, K): one over the root of each eigenvalue, bounded from below; 1 where there has been no gradient."""
        values = (basis * (factor @ basis)).sum(-2)
        floor = (self.config.eigenvalue_floor * values.mean(-1, keepdim=True)).clamp_min(_LEAST)
        seen = values.amax(-1, keepdim=True) > _LEAST
        return torch.where(seen, values.maximum(floor).rsqrt(), torch.ones_like(values))

    def parts(self, info: MatrixInfo) -> Partition | None:
        """Blocks; a block stays whole."""
        return FactoredOptimizer.parts(self, info)

    def cost(self, info: MatrixInfo) -> Cost:
        cost, more = super().cost(info), 0.0
        if len(self.sides(info)) == 2:
            for count, *block in self.grid(info).shapes():
                # eigenvalues, the whitened gradient
                more += sum(count * 2.0 * size * size * (size + other) for size, other in (block, block[::-1]))
        kind = "gemm" if self.is_large(info) else "small_gemm"
        flops = cost.flops | {kind: cost.flops.get(kind, 0.0) + more} if more else cost.flops
        passes = 4.0 * 6 * torch.Size(info.shape).numel() if more else 0.0
        return replace(cost, flops=flops, elementwise_bytes=cost.elementwise_bytes + passes)
