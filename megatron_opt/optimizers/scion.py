"""Scion: norm-constrained steps, spectral for hidden matrices (sign steps elsewhere: `signum`). arXiv 2502.07529."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_opt.optimizers.base import MatrixInfo, Scalars
from megatron_opt.optimizers.muon import SpectralConfig, SpectralOptimizer
from megatron_opt.optimizers.options import choice, decay, option
from megatron_opt.optimizers.registry import register

FORMS = ("study", "unconstrained", "constrained")


@dataclass(frozen=True)
class ScionConfig(SpectralConfig):
    """Hyperparameters of Scion; tuned values of the study."""

    momentum: float = decay(0.95, "momentum μ of the moving average")
    eps: float = option(1e-5, "added to the norm, whose squares fp32 must hold", low=1e-15, high=1.0)
    form: str = choice(
        "study",
        FORMS,
        "weight decay: the run's (study), none (unconstrained), or 1, which keeps ‖W‖ ≤ radius (constrained)",
    )
    radius: float = option(1.0, "factor on the update: the radius of the norm ball", above=0, high=1e6)


@register
class Scion(SpectralOptimizer):
    """buf ← μ·buf + (1−μ)·g;  direction = radius·√max(1, out/in)·NS(buf/(‖buf‖_F + ε)).

    The paper's own scale is `scale_mode=unit_rms_norm`; its constrained form W ← (1−lr)W − lr·radius·O is decay 1.
    """

    name: ClassVar[str] = "scion"
    Config: ClassVar[type] = ScionConfig
    scalars: ClassVar[Scalars] = Scalars("signum", 0.1, {"beta1": 0.98})  # the study's

    def weights(self) -> tuple[float, float, float, float]:
        return self.config.momentum, 1.0 - self.config.momentum, 1.0, 0.0

    def factor(self, info: MatrixInfo) -> float:
        return self.config.radius * super().factor(info)
