"""Fits as a JSON file that other programs, and `study verify`, can read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opt.files import write_output
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.fits.observations import Observations


def fits_as_dict(analysis: Analysis) -> dict[str, Any]:
    """The prediction, laws, speedups, backtests, crossings and suggestions; infinite values are null."""
    laws = {}
    for kind, fit in analysis.fits.items():
        backtest = analysis.held_out.get(kind)
        laws[kind] = {
            "form": fit.form,
            "sigma": fit.sigma,
            "origin": fit.origin,
            "theta": fit.theta.tolist(),
            "columns": [
                "log E",
                "log A",
                "a",
                "log B",
                "b",
                "log kappa",
                "log rho_N, log rho_D of each further optimizer",
            ],
            "optimizers": fit.optimizers,
            "leave_one_out_rmse": _rms(analysis.left_out[kind]),
            "held_out_rmse": None if backtest is None else backtest.rmse,
            "efficiency": {name: fit.efficiency(name) for name in fit.optimizers} if kind == "shared" else None,
            "diagnosis": fit.diagnosis(),
        }
    return {
        "name": analysis.dataset.name,
        "baseline": analysis.data.optimizers[0],
        "noise": asdict(analysis.noise),
        "observations": _observations(analysis.data),
        "own_noise": asdict(analysis.own_noise),
        "comparisons": [
            asdict(item) | {"regime": str(item.regime), "verdict": item.verdict} for item in analysis.comparisons
        ],
        "speedups": [asdict(item) for item in analysis.speedups],
        "wall_clock": _wall_clock(analysis),
        "repetition": {
            "cells": [
                asdict(one)
                | {"regime": str(one.regime), "cost": one.cost and one.cost.gain, "again": one.again and one.again.gain}
                for one in analysis.repetition.cells
            ],
            "r_star": {name: asdict(one) for name, one in analysis.repetition.r_star.items()},
        },
        "prediction": _prediction(analysis),
        "extrapolations": [asdict(item) for item in analysis.statement.predictions] if analysis.statement else [],
        "crossings": [asdict(item) for item in analysis.statement.crossings] if analysis.statement else [],
        "backtests": _backtests(analysis),
        "laws": laws,
        "next_runs": {name: [asdict(run) for run in runs[:10]] for name, runs in analysis.next_runs.items()},
        "hyperparameter_laws": [
            {
                "optimizer": law.optimizer,
                "hyperparameter": law.hyperparameter,
                "theta": law.theta.tolist(),
                "spread": law.spread,
                "center": law.center,
                "widen": law.widen,
                "backtest_inside": law.tested,
                "curvature": law.curvature,
            }
            for law in analysis.hyper_laws
        ],
        "notes": analysis.notes,
    }


def _rms(errors: np.ndarray) -> float | None:
    """Over what is known; None where nothing is."""
    return None if np.isnan(errors).all() else float(np.sqrt(np.nanmean(errors**2)))


def _observations(data: Observations) -> list[dict[str, Any]]:
    """The table that was fitted; with its seeds, so that a reader of the file fits the same law."""
    seeds: list[list[int] | None] = [sorted(seeds_of) for seeds_of in data.seeds]
    seeds = seeds or [None] * len(data)
    return [
        {"optimizer": data.optimizers[k], "parameters": n, "tokens": d, "loss": loss, "run": run, "seeds": mine}
        for k, n, d, loss, run, mine in zip(data.index, data.n, data.d, data.loss, data.runs, seeds)
    ]


def _wall_clock(analysis: Analysis) -> dict[str, Any]:
    """Times to the baseline's final loss, and token speedups in time."""
    wall = analysis.wall
    return {
        "to_baseline": [asdict(one) | {"regime": str(one.regime)} for one in wall.reached],
        "to_own_end": [asdict(one) | {"regime": str(one.regime)} for one in wall.behind],
        "speedups": [asdict(one) for one in wall.speedups],
        "cluster": wall.cluster.name if wall.cluster else None,
        "target": [asdict(one) for one in wall.target],
    }


def _prediction(analysis: Analysis) -> dict[str, Any] | None:
    """The statement in words, the weights of the forms, and how intervals were calibrated."""
    ensemble, statement = analysis.ensemble, analysis.statement
    if ensemble is None or statement is None:
        return None
    return {
        "words": statement.sentences(),
        "calibration": asdict(ensemble.calibration),
        "calibration_words": list(statement.calibration),
        "forms": [
            {
                "form": fit.form.name,
                "weight": weight,
                "spreads": fit.spreads,
                "core": fit.x[: fit.form.core_size].tolist(),
            }
            for fit, weight in ensemble.members
        ],
    }


def _backtests(analysis: Analysis) -> list[dict[str, Any]]:
    """Each held-out loss and gain beside its prediction and 90% interval."""
    rows = []
    for test in analysis.ensemble.backtests if analysis.ensemble else ():
        (low, high), (gain_low, gain_high) = test.intervals("loss"), test.intervals("gain")
        for i in range(len(test.data)):
            others = test.data.index[i] > 0
            rows.append(
                {
                    "sizes_in_fit": test.sizes,
                    "factor": test.factor,
                    "optimizer": test.data.optimizers[test.data.index[i]],
                    "parameters": test.data.n[i],
                    "tokens": test.data.d[i],
                    "loss": test.data.loss[i],
                    "predicted": test.data.loss[i] + test.error[i],
                    "low": low[i],
                    "high": high[i],
                    "gain": test.observed_gain[i] if others else None,
                    "predicted_gain": test.observed_gain[i] + test.gain_error[i] if others else None,
                    "gain_low": gain_low[i] if others else None,
                    "gain_high": gain_high[i] if others else None,
                }
            )
    return rows


def write_fits(analysis: Analysis, path: Path) -> None:
    """Write the fits as JSON, atomically."""
    write_output(path, json.dumps(_plain(fits_as_dict(analysis)), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.floating, float)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
