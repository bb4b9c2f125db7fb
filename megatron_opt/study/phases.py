"""What each phase of a study wants to run next, as a pure function of the results so far.

Nothing is remembered between calls: the scheduler may be killed at any moment and asks again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Seeded
from megatron_opt.study.descent import Search, descend, refine
from megatron_opt.study.runs import Run, make_run
from megatron_opt.study.sensitivity import Sensitivity, Tried, best_of, classify
from megatron_opt.study.spec import MUP, OptimizerSpace, Phase, Regime, Study

if TYPE_CHECKING:
    from megatron_opt.study.fits.significance import Comparison

Lookup = Callable[[Run], float | None]
"""final validation loss of a run: inf when it diverged, None when it has no result yet"""


@dataclass
class Progress:
    """The state of one phase."""

    wanted: list[Run] = field(default_factory=list)
    """every run the phase is known to need so far, finished ones included"""
    complete: bool = True
    trace: list[dict[str, Any]] = field(default_factory=list)
    """decisions in words and numbers, for the report"""


class Planner:
    """Asks the phases of a study in order, each with the results of those before it."""

    def __init__(self, study: Study, lookup: Lookup):
        self.study, self.lookup = study, lookup
        self.tried: dict[str, Tried] = {name: {} for name in study.optimizers}
        self.sensitivity: dict[str, list[Sensitivity]] = {}

    def phases(self) -> list[tuple[Phase, Progress]]:
        """Progress of every phase up to the first that is not complete."""
        kinds = {
            "grid": self._grid,
            "descent": self._descent,
            "restricted": self._restricted,
            "predict": self._predict,
            "seeds": self._seeds,
            "transfer": self._transfer,
        }
        made = []
        for phase in self.study.phases:
            progress = kinds[phase.kind](phase)
            for run in progress.wanted:
                self._remember(run)
            made.append((phase, progress))
            if not progress.complete:
                break
        return made

    def _remember(self, run: Run) -> None:
        loss = self.lookup(run)
        if (
            loss is not None and run.seed == self.study.seeds[0] and MUP not in run.hyper
        ):  # laws are of one parametrization
            cell = self.tried[run.optimizer].setdefault(run.regime, [])
            if (run.hyper, loss) not in cell:
                cell.append((run.hyper, loss))

    def _run(self, name: str, regime: Regime, point: dict[str, Any], seed: int | None = None) -> Run:
        return make_run(self.study, name, regime, point, self.study.seeds[0] if seed is None else seed)

    def _spaces(self, phase: Phase) -> dict[str, OptimizerSpace]:
        """The optimizers that a phase is for."""
        return {name: self.study.optimizers[name] for name in phase.optimizers or self.study.optimizers}

    def _collect(self, runs: list[Run]) -> Progress:
        return Progress(runs, all(self.lookup(run) is not None for run in runs))

    def _grid(self, phase: Phase) -> Progress:
        return self._collect(
            [
                self._run(name, regime, point)
                for regime in phase.regimes
                for name, space in self._spaces(phase).items()
                for point in space.points()
            ]
        )

    def _descent(self, phase: Phase) -> Progress:
        spaces = self._spaces(phase)
        progress = self._search(
            phase,
            {(name, regime): (space.start, space.grid) for regime in phase.regimes for name, space in spaces.items()},
        )
        if progress.complete:
            for run in progress.wanted:
                self._remember(run)
            for name, space in spaces.items():
                tried = {regime: runs for regime, runs in self.tried[name].items() if regime in phase.regimes}
                self.sensitivity[name] = classify(name, space.grid, tried, self.study.insensitive)
                progress.trace += [{"kind": "sensitivity", **asdict(one)} for one in self.sensitivity[name]]
        return progress

    def _restricted(self, phase: Phase) -> Progress:
        """Sweep only the sensitive hyperparameters, from the nearest tuned regime."""
        starts = {}
        for regime in phase.regimes:
            for name, space in self._spaces(phase).items():
                start = dict(best_of(self.tried[name][self._nearest(name, regime)])[0])
                start |= {one.hyperparameter: one.value for one in self.sensitivity[name] if not one.sensitive}
                sensitive = {one.hyperparameter for one in self.sensitivity[name] if one.sensitive}
                grid = {key: values for key, values in space.grid.items() if key in sensitive}
                starts[name, regime] = (start, grid)
        return self._search(phase, starts)

    def _search(self, phase: Phase, starts: dict[tuple[str, Regime], tuple[dict, dict]]) -> Progress:
        """Descend everywhere; then, for equal effort, let early finishers refine up to the largest
        run count.
        """
        progress = Progress()
        for regime in phase.regimes:
            searches: dict[str, Search] = {}
            for name in self._spaces(phase):
                start, grid = starts[name, regime]
                searches[name] = descend(
                    start, grid, self._evaluate(name, regime), self.study.adopt, self.study.max_runs
                )
            if self.study.equal_effort and all(search.complete for search in searches.values()):
                most = max(len(search.wanted) for search in searches.values())
                for name, search in searches.items():
                    if len(search.wanted) < most:
                        refine(search, search.grid, self._evaluate(name, regime), most)
            for name, search in searches.items():
                progress.wanted += [self._run(name, regime, point) for point in search.wanted]
                progress.complete &= search.complete
                progress.trace += [
                    {
                        "kind": "sweep",
                        "phase": phase.kind,
                        "optimizer": name,
                        "regime": str(regime),
                        **asdict(sweep),
                    }
                    for sweep in search.sweeps
                ]
                if search.out_of_budget:
                    progress.trace.append(
                        {
                            "kind": "budget",
                            "phase": phase.kind,
                            "optimizer": name,
                            "regime": str(regime),
                            "runs": len(search.wanted),
                        }
                    )
        return progress

    def _evaluate(self, name: str, regime: Regime) -> Callable[[dict[str, Any]], float | None]:
        return lambda point: self.lookup(self._run(name, regime, point))

    def _nearest(self, name: str, regime: Regime) -> Regime:
        """The tuned regime closest in log N, log D and log epochs."""

        def coordinates(one: Regime) -> np.ndarray:
            parameters = self.study.models[one.model].non_embedding_parameters
            return np.log([parameters, self.study.tokens(one), one.epochs])

        return min(self.tried[name], key=lambda one: float(np.linalg.norm(coordinates(one) - coordinates(regime))))

    def _predict(self, phase: Phase) -> Progress:
        """One run an optimizer and target, its hyperparameters from the laws h(N, D) of the tuned regimes."""
        runs, trace = [], []
        for regime in phase.regimes:
            for name in self._spaces(phase):
                point, laws = self._predicted(name, regime)
                runs.append(self._run(name, regime, point))
                trace.append(
                    {
                        "kind": "prediction",
                        "optimizer": name,
                        "regime": str(regime),
                        "point": point,
                        "from_laws": laws,
                    }
                )
        progress = self._collect(runs)
        progress.trace = trace
        return progress

    def _predicted(self, name: str, regime: Regime) -> tuple[dict[str, Any], list[str]]:
        tuned = {one: best_of(runs)[0] for one, runs in self.tried[name].items() if one != regime}
        tuned = {one: hyper for one, hyper in tuned.items() if one.epochs == regime.epochs}
        point = dict(best_of(self.tried[name][self._nearest(name, regime)])[0])
        verdicts = {one.hyperparameter: one for one in self.sensitivity.get(name, [])}
        laws = []
        n = float(self.study.models[regime.model].non_embedding_parameters)
        for key, values in self.study.optimizers[name].grid.items():
            verdict = verdicts.get(key)
            if verdict is not None and not verdict.sensitive:
                point[key] = verdict.value
                continue
            value = _law_value(
                name,
                key,
                [(self._scale(one), hyper[key]) for one, hyper in tuned.items()],
                (n, self.study.tokens(regime)),
                values,
            )
            if value is not None:
                point[key] = value
                laws.append(key)
        return point, laws

    def _scale(self, regime: Regime) -> tuple[float, float]:
        return float(self.study.models[regime.model].non_embedding_parameters), self.study.tokens(regime)

    def _seeds(self, phase: Phase) -> Progress:
        """The winner of each cell again with further seeds: two everywhere, then one at a time where it is open."""
        winners = {
            (name, regime): best_of(self.tried[name][regime])[0]
            for regime in phase.regimes
            for name in self._spaces(phase)
            if regime in self.tried[name] and math.isfinite(best_of(self.tried[name][regime])[1])
        }
        fresh = self.study.seeds[1:]
        progress = Progress([self._run(*cell, point) for cell, point in winners.items()])
        asked = set(winners)
        for count in range(min(2, len(fresh)), len(fresh) + 1):
            seeds = fresh[:count] if count <= 2 else fresh[count - 1 : count]
            progress.wanted += [
                self._run(*cell, winners[cell], seed) for cell in winners if cell in asked for seed in seeds
            ]
            if any(self.lookup(run) is None for run in progress.wanted):
                progress.complete = False
                break
            if count == len(fresh) or count < 2:
                break
            compared = self._compare(progress.wanted, phase)
            asked = {(one.optimizer, one.regime) for one in compared if not one.settled}
            asked |= {(self.study.baseline, regime) for _, regime in asked}
            settled = [[one.optimizer, str(one.regime), one.verdict] for one in compared if one.settled]
            progress.trace.append(
                {"kind": "look", "seeds": count, "open": len(compared) - len(settled), "settled": settled}
            )
        return progress

    def _transfer(self, phase: Phase) -> Progress:
        """Tune at the proxy, carry the winner to every wider regime with and without µP, and sweep the rate there too.

        At its own width µP changes nothing, so that one search serves both. Carried and swept winners get all further seeds.
        """
        assert phase.proxy is not None
        spaces = self._spaces(phase)
        starts = {(name, phase.proxy): (space.start, space.grid) for name, space in spaces.items()}
        progress = self._search(replace(phase, regimes=(phase.proxy,)), starts)
        if not progress.complete:
            return progress
        tried: dict[str, Tried] = {}
        for run in progress.wanted:
            loss = self.lookup(run)
            tried.setdefault(run.optimizer, {}).setdefault(phase.proxy, []).append(
                (run.hyper, math.inf if loss is None else loss)
            )
        for name, space in spaces.items():
            tuned, loss = best_of(tried[name][phase.proxy])
            if not math.isfinite(loss):
                continue
            progress.wanted += [self._run(name, phase.proxy, tuned, seed) for seed in self.study.seeds[1:]]
            for regime in phase.regimes:
                for kind in phase.parametrizations:
                    self._carry(progress, phase, name, regime, kind, tuned, space.grid.get("lr", ()))
        progress.complete &= all(self.lookup(run) is not None for run in progress.wanted)
        return progress

    def _carry(
        self,
        progress: Progress,
        phase: Phase,
        name: str,
        regime: Regime,
        kind: str,
        tuned: dict[str, Any],
        rates: tuple,
    ) -> None:
        assert phase.proxy is not None
        point = tuned | ({MUP: phase.proxy.model} if kind == MUP else {})
        entry: dict[str, Any] = {
            "kind": "transfer",
            "optimizer": name,
            "regime": str(regime),
            "proxy": str(phase.proxy),
        }
        entry |= {"parametrization": kind, "carried": point}
        if not phase.sweep:
            progress.wanted += [self._run(name, regime, point, seed) for seed in self.study.seeds]
            progress.trace.append(entry | {"best": None})
            return
        search = descend(point, {"lr": rates}, self._evaluate(name, regime), self.study.adopt, self.study.max_runs)
        progress.wanted += [self._run(name, regime, one) for one in search.wanted]
        progress.complete &= search.complete
        if not search.complete:
            return
        losses = [self._evaluate(name, regime)(one) for one in search.wanted]
        tried = [(one, math.inf if loss is None else loss) for one, loss in zip(search.wanted, losses)]
        best, _ = best_of(tried)
        progress.trace.append(entry | {"best": best})
        repeated = [one for one, loss in tried if one in (point, best) and math.isfinite(loss)]
        progress.wanted += [self._run(name, regime, one, seed) for one in repeated for seed in self.study.seeds[1:]]

    def _compare(self, repeated: list[Run], phase: Phase) -> list[Comparison]:
        """The table of comparisons as it stands with these runs, which all have a result."""
        from megatron_opt.study.fits.significance import compare_all  # scipy, needed by this phase alone

        cells = {}
        for name in self._spaces(phase):
            for regime in phase.regimes:
                mine = [run for run in repeated if (run.optimizer, run.regime) == (name, regime)]
                chosen = len(self.tried[name].get(regime, ())) > 1
                losses = [
                    (run.seed, loss, run.id)
                    for run in mine
                    if (loss := self.lookup(run)) is not None and math.isfinite(loss)
                    if not chosen or run.seed != self.study.seeds[0]
                ]
                if losses:
                    seeds, values, ids = zip(*losses)
                    cells[name, regime] = Seeded(values, seeds, ids)
        return compare_all(
            cells, self.study.baseline, self._spaces(phase), phase.regimes, self.study.looks, self.study.adopt
        )


def _law_value(
    name: str,
    key: str,
    cells: list[tuple[tuple[float, float], Any]],
    target: tuple[float, float],
    grid: tuple,
) -> Any | None:
    """The law's value at the target, to three digits; None where there is no law to fit."""
    numbers = [value for _, value in cells]
    if len(cells) < 3 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
        return None
    from megatron_opt.study.fits.hyper_laws import fit_hyper_law  # scipy, needed by this phase alone

    try:
        law = fit_hyper_law(
            name,
            key,
            np.array([n for (n, _), _ in cells]),
            np.array([d for (_, d), _ in cells]),
            np.array(numbers),
        )
    except UserError:
        return None
    value = float(f"{float(law.predict(*target)):.3g}")
    if max(grid) < 1:
        value = min(value, 0.999)
    return max(1, round(value)) if all(isinstance(v, int) for v in grid) else value
