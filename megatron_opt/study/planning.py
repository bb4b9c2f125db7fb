"""What a study will cost before it starts: runs, tokens, FLOPs and hours of each phase."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megatron_opt.study.expected import expected_runs
from megatron_opt.study.runs import Run
from megatron_opt.study.spec import Study
from megatron_opt.study.store import Record


@dataclass(frozen=True)
class PhaseCost:
    """The cost of one phase for one optimizer. Descent phases give the least and the most number of runs."""

    phase: str
    optimizer: str
    least: int
    most: int
    tokens: float
    flops: float
    """tokens and FLOPs of the largest number of runs"""
    hours: float | None
    """of all runs one after the other; None while no speed is known"""


def plan_costs(study: Study, records: list[Record]) -> list[PhaseCost]:
    """Costs of every phase and optimizer; `records` are finished runs whose measured speed sets the hours."""
    speed = measured_speed(study, records)
    costs = []
    for phase in study.phases:
        for name in study.optimizers:
            least, most, runs = expected_runs(study, phase, name)
            scale = most / len(runs) if runs else 0.0
            tokens = scale * sum(run.tokens for run in runs)
            flops = scale * sum(run_flops(study, run) for run in runs)
            hours = None if speed is None else flops / speed / 3600
            costs.append(PhaseCost(phase.title, name, least, most, tokens, flops, hours))
    return costs


def run_flops(study: Study, run: Run) -> float:
    """Training FLOPs of a run; the optimizer's own are not in it."""
    model = study.models[run.regime.model]
    return run.tokens * model.flops_per_token(study.sequence_length, study.data.vocabulary)


def measured_speed(study: Study, records: list[Record]) -> float | None:
    """FLOPs a second of one run: the median of finished runs, else what the study file expects, else None."""
    speeds = []
    for record in records:
        model, seconds = study.models.get(record.regime.model), record.results.get("wall_time_s")
        if model is not None and seconds:
            speeds.append(record.tokens * model.flops_per_token(study.sequence_length, study.data.vocabulary) / seconds)
    return statistics.median(speeds) if speeds else study.executor.flops_per_s
