"""What each phase of a study wants to run next, as a pure function of the results so far.

Nothing is remembered between calls: the scheduler may be killed at any moment and asks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_opt.study.runs import Run, make_run
from megatron_opt.study.spec import Phase, Regime, Study

Lookup = Callable[[Run], float | None]
"""final validation loss of a run: inf when it diverged, None when it has no result yet"""


@dataclass
class Progress:
    """The state of one phase."""

    wanted: list[Run] = field(default_factory=list)
    """every run the phase is known to need so far, finished ones included"""
    complete: bool = True


def advance(study: Study, phase: Phase, lookup: Lookup) -> Progress:
    """What a phase needs, given the results so far."""
    return _PHASES[phase.kind](study, phase, lookup)


def _collect(runs: list[Run], lookup: Lookup) -> Progress:
    return Progress(runs, all(lookup(run) is not None for run in runs))


def _grid(study: Study, phase: Phase, lookup: Lookup) -> Progress:
    return _collect(
        [
            make_run(study, name, regime, point, study.seeds[0])
            for regime in phase.regimes
            for name, space in study.optimizers.items()
            for point in space.points()
        ],
        lookup,
    )


def best_point(study: Study, optimizer: str, regime: Regime, lookup: Lookup) -> dict[str, Any] | None:
    """The hyperparameters of the lowest loss that the search phases found in a regime, first seed."""
    best, best_loss = None, math.inf
    for phase in study.phases:
        if phase.kind == "seeds" or regime not in phase.regimes:
            continue
        for run in advance(study, phase, lookup).wanted:
            if run.optimizer == optimizer and run.regime == regime and (lookup(run) or math.inf) < best_loss:
                best, best_loss = run.hyper, lookup(run) or math.inf
    return best


def _seeds(study: Study, phase: Phase, lookup: Lookup) -> Progress:
    runs = []
    for regime in phase.regimes:
        for name in study.optimizers:
            point = best_point(study, name, regime, lookup)
            if point is not None:
                runs += [make_run(study, name, regime, point, seed) for seed in study.seeds]
    return _collect(runs, lookup)


_PHASES: dict[str, Callable[[Study, Phase, Lookup], Progress]] = {"grid": _grid, "seeds": _seeds}


def expected_runs(study: Study, phase: Phase, optimizer: str) -> tuple[int, int, list[Run]]:
    """(least, most, sample) number of runs of a phase before anything is known; the sample has the
    runs' sizes.
    """
    space = study.optimizers[optimizer]
    if phase.kind == "seeds":
        runs = [
            make_run(study, optimizer, regime, space.start, seed)
            for regime in phase.regimes
            for seed in study.seeds[1:]
        ]
        return len(runs), len(runs), runs
    runs = [
        make_run(study, optimizer, regime, point, study.seeds[0])
        for regime in phase.regimes
        for point in space.points()
    ]
    return len(runs), len(runs), runs
