"""`study verify`: predictions from the smaller runs beside what the large runs gave."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import from_store
from megatron_opt.study.display import make_console, print_table
from megatron_opt.study.fits.ensemble import fit_ensemble
from megatron_opt.study.fits.hierarchy import Noise
from megatron_opt.study.fits.noise import noise_floor
from megatron_opt.study.fits.observations import Observations, observations
from megatron_opt.study.fits.scaling import KINDS, fit_law
from megatron_opt.study.fits.validation import Prediction, predict, predict_by
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Store

HEADER = [
    "law",
    "optimizer",
    "parameters",
    "tokens",
    "predicted",
    "90% interval",
    "outcome",
    "error",
    "inside",
    "run",
]


def verification(data: Observations, held: np.ndarray, noise: float) -> dict[str, Prediction]:
    """Fit the runs outside `held` (a mask) by the hierarchical law, and by shared and separate ones beside it."""
    known, ahead = data.where(~held), data.where(held)
    found = {"hierarchical": predict_by(fit_ensemble(known, Noise(noise)), ahead)}
    for kind in KINDS:
        found[kind] = predict(fit_law(known, kind, noise=noise, resamples=200), ahead)
    return found


def main(argv: list[str], prog: str) -> int:
    """Predict the held-out regimes from all the others; exit code 0 also when the prediction was wrong."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument(
        "--regimes",
        nargs="+",
        metavar="MODEL@RATIO",
        help="regimes to predict (default: those of the predict phase, else the largest model)",
    )
    options = parser.parse_args(argv)
    console = make_console()
    with Store(options.output / STORE_NAME) as store:
        dataset = from_store(store)
    held = _held(dataset.phases.get("predict", []), dataset, options.regimes)
    data = observations(dataset)
    regimes = {record.id: record.regime for record in dataset.records}
    mask = np.array([regimes[run] in held for run in data.runs])
    if not mask.any():
        raise UserError(f"no finished run in {', '.join(map(str, sorted(held)))}; run the study to its end first")
    rows = []
    results = verification(data, mask, noise_floor(dataset).sigma)
    for kind, found in results.items():
        for i in range(len(found.data)):
            inside = found.low[i] <= found.data.loss[i] <= found.high[i]
            rows.append(
                [
                    kind,
                    data.optimizers[found.data.index[i]],
                    f"{found.data.n[i]:,.0f}",
                    f"{found.data.d[i]:.3g}",
                    f"{found.predicted[i]:.4f}",
                    f"{found.low[i]:.4f} to {found.high[i]:.4f}",
                    f"{found.data.loss[i]:.4f}",
                    f"{found.predicted[i] - found.data.loss[i]:+.4f}",
                    "yes" if inside else "no",
                    found.data.runs[i],
                ]
            )
    print_table(console, HEADER, rows, f"{dataset.name}: predicted without {', '.join(map(str, sorted(held)))}")
    for kind, found in results.items():
        console.print(
            f"{kind} law: error {found.rmse:.4f}, {found.coverage:.0%} of {len(found.data)} losses inside "
            "their 90% interval"
        )
    return 0


def _held(predicted: list[str], dataset, chosen: list[str] | None) -> set[Regime]:
    if chosen is not None:
        regimes = {Regime.parse(text) for text in chosen}
        unknown = sorted(regimes - set(dataset.regimes))
        if unknown:
            raise UserError(
                f"no runs of {', '.join(map(str, unknown))}; there are {', '.join(map(str, dataset.regimes))}"
            )
        return regimes
    by_id = {record.id: record.regime for record in dataset.records}
    if predicted:
        return {by_id[run] for run in predicted}
    return {regime for regime in dataset.regimes if regime.model == dataset.models[-1]}
