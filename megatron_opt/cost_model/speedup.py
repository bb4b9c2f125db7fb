"""Wall-clock speedup over another optimizer: the study's one prediction of the tokens, over the ratio of step times."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.step import Step, predict
from megatron_opt.errors import UserError
from megatron_opt.study.fits.statement import Prediction
from megatron_opt.study.fits.statement import predict as state_at
from megatron_opt.study.prediction import load


@dataclass(frozen=True)
class Speedup:
    """What a study says of an optimizer against another at a step's model size, and what it is worth in time."""

    against: str
    study: str
    ratio: float
    """seconds of a step over those of the other optimizer's, in the same layout"""
    tokens: Prediction
    chinchilla: float
    chance: float
    """P(time is saved)"""

    @property
    def wall_clock(self) -> tuple[float, float, float]:
        """Token speedup over the ratio of step times: value and 90% interval."""
        tokens = self.tokens.speedup
        return tokens.value / self.ratio, tokens.low / self.ratio, tokens.high / self.ratio

    def text(self) -> str:
        """Two sentences."""
        value, low, high = self.wall_clock
        reach = self.tokens.reach
        where = f", {reach:.1f} times the largest model that it ran" if reach > 1.05 else ""
        return (
            f"Against {self.against} in the same layout a step takes {self.ratio:.3f} times as long. By {self.study} "
            f"({self.tokens.n:.3g} parameters, {self.chinchilla:g}x tokens{where}) {self.against} needs "
            f"{self.tokens.speedup.text(2)} times the tokens for the same loss: wall-clock speedup {value:.2f} ({low:.2f} to "
            f"{high:.2f}, 90% interval), P(time is saved) {self.chance:.0%}."
        )


def speedup(
    flags: Mapping[str, Any], step: Step, cluster: Cluster, against: str, study: str | None, chinchilla: float
) -> Speedup:
    """Compare a step with that of `against` under the same flags; raises UserError for optimizers the study lacks."""
    if not chinchilla > 0:
        raise UserError(f"--chinchilla is {chinchilla}; it must be greater than 0.")
    known = load(study)
    name = {"adam": "adamw"}.get(step.optimizer_name, step.optimizer_name)
    for one in (name, against):
        if one not in known.data.optimizers:
            raise UserError(f"{known.name} has no results of {one}; it has {', '.join(known.data.optimizers)}.")
    if name == against:
        raise UserError(f"--against is {against}, the optimizer of the step itself; name another.")
    n = float(step.model.hidden_parameters)
    d = chinchilla * known.tokens_per_parameter * n
    law = known.law(against)
    tokens = state_at(law, name, n, d)
    other = predict({**flags, "optimizer": against}, cluster, step.layout.world)
    ratio = step.seconds / other.seconds
    chance = float(np.mean(law.speedups(name, n, d) > ratio))
    return Speedup(against, known.name, ratio, tokens, chinchilla, chance)


def as_dict(speedup: Speedup) -> dict[str, Any]:
    """The numbers; an infinite speedup is null."""
    value, low, high = (x if np.isfinite(x) else None for x in speedup.wall_clock)
    s = speedup.tokens.speedup
    return {
        "against": speedup.against,
        "study": speedup.study,
        "step_time_ratio": speedup.ratio,
        "chinchilla": speedup.chinchilla,
        "token_speedup": {key: x if np.isfinite(x) else None for key, x in vars(s).items()},
        "wall_clock_speedup": {"value": value, "low": low, "high": high},
        "chance_of_saving": speedup.chance,
    }
