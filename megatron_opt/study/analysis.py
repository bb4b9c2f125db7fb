"""Everything the fits say about a data set, computed once for the command line, the report and `verify`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.ensemble import Ensemble
from megatron_opt.study.fits.gain_law import GainCheck, check_gain_law
from megatron_opt.study.fits.hyper_laws import HyperLaw, fit_hyper_laws
from megatron_opt.study.fits.next_runs import NextRun, next_runs
from megatron_opt.study.fits.noise import NoiseFloor, noise_floor
from megatron_opt.study.fits.observations import Observations, observations
from megatron_opt.study.fits.optima import optima
from megatron_opt.study.fits.repetition import Repetition, repetition
from megatron_opt.study.fits.scaling import KINDS, Fit, fit_law
from megatron_opt.study.fits.significance import Comparison, SeedNoise, compare_all, own_noise
from megatron_opt.study.fits.speedups import Speedup, speedups
from megatron_opt.study.fits.statement import Statement, state
from megatron_opt.study.fits.validation import Prediction, hold_out_largest, leave_one_out
from megatron_opt.study.fits.wall_clock import ClusterTimes, WallClock, times_reached, wall_clock
from megatron_opt.study.prediction import law_of
from megatron_opt.study.spec import MUP

LAW_HYPERPARAMETERS = ("lr", "batch_size", "warmup", "weight_decay")


@dataclass
class Analysis:
    """Fits and what follows from them; what could not be computed is said in `notes`."""

    dataset: Dataset
    data: Observations
    noise: NoiseFloor
    target: tuple[float, tuple[float, ...]]
    """N and the Chinchilla ratios to extrapolate to"""
    speedups: list[Speedup] = field(default_factory=list)
    ensemble: Ensemble | None = None
    """the hierarchical law in all its forms"""
    statement: Statement | None = None
    """what it says at the target: the one prediction that is quoted"""
    simple: GainCheck | None = None
    """the law of the paired gain alone, backtested beside it"""
    fits: dict[str, Fit] = field(default_factory=dict)
    """shared and separate laws: diagnostics, never the headline"""
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    """kind → leave-one-out errors"""
    held_out: dict[str, Prediction] = field(default_factory=dict)
    next_runs: dict[str, list[NextRun]] = field(default_factory=dict)
    """optimizer → candidate runs, the most informative first"""
    hyper_laws: list[HyperLaw] = field(default_factory=list)
    own_noise: SeedNoise = field(default_factory=lambda: SeedNoise(math.nan, 0))
    """what is left of a loss after its optimizer and its seed"""
    comparisons: list[Comparison] = field(default_factory=list)
    """each optimizer against the baseline in each regime"""
    wall: WallClock = field(default_factory=WallClock)
    """the same speedups in seconds, here and on a cluster"""
    repetition: Repetition = field(default_factory=Repetition)
    """what repeated tokens are worth"""
    notes: list[str] = field(default_factory=list)


def analyse(
    dataset: Dataset,
    *,
    optimizers: list[str] | None = None,
    target: float | None = None,
    ratios: tuple[float, ...] | None = None,
    resamples: int = 200,
    cluster: ClusterTimes | None = None,
) -> Analysis:
    """Fit a data set; raises UserError when there is nothing to compare. Target and ratios: the data
    set's own. `cluster`: what steps take elsewhere.
    """
    if optimizers is not None:
        optimizers = [dataset.baseline] + [name for name in optimizers if name != dataset.baseline]
    data, noise = observations(dataset, optimizers), noise_floor(dataset)
    analysis = Analysis(dataset, data, noise, (target or dataset.target[0], tuple(ratios or dataset.target[1])))
    if not noise.measured:
        analysis.notes.append(
            "No configuration ran with two seeds: the noise of a final loss is assumed to be "
            f"{noise.sigma:g}. "
            "No p-value is made from that; nothing can be said about a single difference."
        )
    _compare(analysis)
    _fit_ensemble(analysis)
    analysis.speedups = speedups(data, noise.sigma, resamples, ensemble=analysis.ensemble)
    analysis.repetition = repetition(dataset, data, noise.sigma, analysis.ensemble)
    analysis.wall = wall_clock(dataset, analysis.speedups, analysis.statement, cluster)
    _fit_laws(analysis, resamples)
    _fit_hyper_laws(analysis)
    return analysis


@dataclass(frozen=True)
class Unfitted:
    """Why there are no fits, and what needs none."""

    reason: str
    wall: WallClock


def analyse_if_possible(
    dataset: Dataset, *, cluster: ClusterTimes | None = None, **arguments: Any
) -> Analysis | Unfitted:
    """The same, or the reason why there is nothing to compare yet."""
    try:
        return analyse(dataset, cluster=cluster, **arguments)
    except UserError as error:
        return Unfitted(f"No fits: {error}.", times_reached(dataset, cluster))


def _compare(analysis: Analysis) -> None:
    dataset, best = analysis.dataset, analysis.dataset.best()
    cells = {key: cell for key, cell in best.items() if key[0] in analysis.data.optimizers}
    analysis.own_noise = own_noise(cells)
    analysis.comparisons = compare_all(
        cells, dataset.baseline, analysis.data.optimizers[1:], dataset.regimes, dataset.looks, dataset.margin, True
    )
    unpaired = sorted({str(c.regime) for c in analysis.comparisons if c.p is not None and not c.paired})
    if unpaired:
        analysis.notes.append(
            f"Compared without shared seeds, which needs more of them: {', '.join(unpaired)}. The noise there is that of a "
            "loss over seeds, their common part included."
        )
    chosen = sorted({str(regime) for (_, regime), cell in cells.items() if cell.chosen})
    if chosen:
        analysis.notes.append(
            "Losses of the one seed on which configurations were chosen, lower by that luck (0.7 to 1.5 of its standard "
            f"deviations), in {', '.join(chosen)}; runs with other seeds replace them."
        )


def _fit_ensemble(analysis: Analysis) -> None:
    n, ratios = analysis.target
    per_parameter, noise = analysis.dataset.tokens_per_parameter, analysis.noise
    try:
        analysis.ensemble = law_of(analysis.data, noise)
    except UserError as error:
        analysis.notes.append(f"No prediction beyond what was run: {error}.")
        return
    analysis.statement = state(analysis.ensemble, n, ratios, per_parameter)
    analysis.simple = check_gain_law(analysis.ensemble.backtests, analysis.data)
    wild = sorted({run for fit, _ in analysis.ensemble.members for run in _runs(fit.problem.data, fit.wild)})
    if wild:
        analysis.notes.append(
            f"Weighed down in the law, being over four standard errors from what all others say: {', '.join(wild)}."
        )
    d = ratios[0] * per_parameter * n
    analysis.next_runs = {
        name: next_runs(analysis.ensemble, name, n, d, tokens_per_parameter=per_parameter)
        for name in analysis.data.optimizers[1:]
    }


def _runs(data: Observations, mask: np.ndarray) -> list[str]:
    return [run for run, keep in zip(data.runs, mask) if keep]


def _fit_laws(analysis: Analysis, resamples: int) -> None:
    for kind in KINDS:
        try:
            fit = fit_law(analysis.data, kind, noise=analysis.noise.sigma, resamples=resamples)
        except UserError as error:
            analysis.notes.append(f"No {kind} law: {error}.")
            continue
        analysis.fits[kind] = fit
        analysis.left_out[kind] = leave_one_out(fit)
        analysis.notes += fit.diagnosis()
        try:
            analysis.held_out[kind] = hold_out_largest(analysis.data, kind, analysis.noise.sigma, resamples)
        except UserError as error:
            analysis.notes.append(f"No held-out check of the {kind} law: {error}.")


def _fit_hyper_laws(analysis: Analysis) -> None:
    # Under µP a rate is that of the base width: such runs follow no law of sizes.
    plain = replace(analysis.dataset, records=[r for r in analysis.dataset.records if MUP not in r.hyper], _best=None)
    for key in LAW_HYPERPARAMETERS:
        known = {name: optima(plain, name, key, analysis.noise.sigma) for name in analysis.data.optimizers}
        # Three regimes make a law; one value everywhere leaves nothing to fit.
        known = {k: v for k, v in known.items() if len(v) >= 3 and len({one.tuned for one in v}) > 1}
        if known:
            analysis.hyper_laws += fit_hyper_laws(key, known)
