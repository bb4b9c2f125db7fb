"""How many runs a phase will ask for, before anything is known."""

from __future__ import annotations

from megatron_opt.study.runs import Run, make_run
from megatron_opt.study.spec import MUP, OptimizerSpace, Phase, Study


def expected_runs(study: Study, phase: Phase, optimizer: str) -> tuple[int, int, list[Run]]:
    """(least, most, sample) runs of a phase before anything is known; the sample has the sizes of all.

    A descent takes one pass at least; three passes are counted as the most, or the budget of runs.
    """
    if phase.optimizers and optimizer not in phase.optimizers:
        return 0, 0, []
    space, seed = study.optimizers[optimizer], study.seeds[0]
    if phase.kind == "transfer":
        return _transfer_runs(study, phase, optimizer)
    if phase.kind == "seeds":
        points, seeds = [space.start], study.seeds[1:]
    elif phase.kind == "grid":
        points, seeds = space.points(), (seed,)
    else:
        points, seeds = [space.start], (seed,)
    sample = [
        make_run(study, optimizer, regime, point, one) for regime in phase.regimes for point in points for one in seeds
    ]
    if phase.kind == "seeds":
        return min(2, len(study.seeds) - 1) * len(phase.regimes), len(sample), sample
    if phase.kind not in ("descent", "restricted"):
        return len(sample), len(sample), sample
    one_pass = _pass(space)
    least, most = (one_pass, 3 * one_pass - 2) if phase.kind == "descent" else (1, 2 * one_pass)
    limit = study.max_runs or most
    return min(least, limit) * len(phase.regimes), min(most, limit) * len(phase.regimes), sample


def _transfer_runs(study: Study, phase: Phase, optimizer: str) -> tuple[int, int, list[Run]]:
    """One pass of the search at the proxy and its seeds; at each width the rates, and seeds of one or two winners."""
    assert phase.proxy is not None
    space, (first, *fresh) = study.optimizers[optimizer], study.seeds
    start, rates = space.start, space.grid.get("lr", (space.start["lr"],))
    sample = []
    if not any(one.proxy == phase.proxy for one in study.phases[: study.phases.index(phase)]):  # else tuned already
        sample = [make_run(study, optimizer, phase.proxy, start, first)] * _pass(space)
        sample += [make_run(study, optimizer, phase.proxy, start, seed) for seed in fresh]
    for regime in phase.regimes:
        for kind in phase.parametrizations:
            point = start | ({MUP: phase.proxy.model} if kind == MUP else {})
            tried = rates if phase.sweep else rates[:1]
            sample += [make_run(study, optimizer, regime, point | {"lr": rate}, first) for rate in tried]
            sample += [make_run(study, optimizer, regime, point, seed) for seed in fresh] * (2 if phase.sweep else 1)
    shared = len(fresh) * len(phase.regimes) * len(phase.parametrizations) if phase.sweep else 0
    fewest = len(sample) - shared  # where the carried rate is the best
    return fewest, len(sample), sample


def _pass(space: OptimizerSpace) -> int:
    return 1 + sum(len(values) - 1 for values in space.grid.values())
