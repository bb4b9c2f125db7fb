"""Steps to a target loss by the rule of the optimizer track of modded-nanogpt.

All runs are evaluated at the same steps; the earliest step counts at which (target − mean loss)·√runs ≥ margin, one step for all
runs. The track's margin is 3.09·σ for p < 0.001, σ of one run's final loss 0.0013 there.
Source: github.com/KellerJordan/modded-nanogpt, records/track_3_optimization/README.md, "Rules".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_opt.errors import UserError
from megatron_opt.study.fits.wall_clock import crossing

NORMAL_QUANTILE = 3.09  # one-sided, p < 0.001
TRACK_MARGIN = 0.004


@dataclass(frozen=True)
class Attained:
    """What several runs of one setup say of a target."""

    steps: int | None
    """the earliest step with significance; None: none has it"""
    loss: float
    """mean over runs at that step, else at the last common one"""
    runs: int
    evidence: float
    """(target − mean)·√runs, of the same step"""
    crossing: float | None
    """step at which the mean curve is at the target, between two evaluations"""
    spread: float
    """standard deviation of one run's loss there; NaN for one run"""


def steps_to_target(
    curves: Sequence[Sequence[tuple[int, float]]], target: float, margin: float = TRACK_MARGIN
) -> Attained:
    """`curves`: (step, validation loss) of each run of one setup; raises UserError where they share no step."""
    losses: list[Mapping[int, float]] = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(one) for one in losses))) if losses else []
    if not shared:
        raise UserError("the runs have no evaluation at the same step; give all of one setup the same schedule.")
    root = math.sqrt(len(losses))
    means = [(step, sum(one[step] for one in losses) / len(losses)) for step in shared]
    # a rounding of the mean must not decide
    step, mean = next(((s, m) for s, m in means if (target - m) * root >= margin - 1e-9), means[-1])
    evidence = (target - mean) * root
    squares = sum((one[step] - mean) ** 2 for one in losses)
    return Attained(
        step if evidence >= margin - 1e-9 else None,
        mean,
        len(losses),
        evidence,
        crossing([(max(s, 1), m) for s, m in means], target),
        math.sqrt(squares / (len(losses) - 1)) if len(losses) > 1 else math.nan,
    )
