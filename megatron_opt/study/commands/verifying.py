"""`study verify`: registered predictions, else predictions from the smaller runs, beside what the large runs gave."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_opt.errors import UserError
from megatron_opt.report.terminal import make_console, print_table
from megatron_opt.study.commands.fitting import add_without
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.fits.noise import NoiseFloor, noise_floor
from megatron_opt.study.fits.observations import Observations, observations
from megatron_opt.study.fits.scaling import KINDS, fit_law
from megatron_opt.study.fits.validation import Prediction, predict, predict_by
from megatron_opt.study.prediction import law_of
from megatron_opt.study.registration import predictions
from megatron_opt.study.report.registered import registered
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


def verification(data: Observations, held_out: np.ndarray, noise: NoiseFloor) -> dict[str, Prediction]:
    """Fit the runs outside `held` (a mask) by the hierarchical law, and by shared and separate ones beside it."""
    known, ahead = data.where(~held_out), data.where(held_out)
    predictions = {"hierarchical": predict_by(law_of(known, noise), ahead)}
    for kind in KINDS:
        predictions[kind] = predict(fit_law(known, kind, noise=noise.sigma, resamples=200), ahead)
    return predictions


def main(argv: list[str], prog: str) -> int:
    """Score registered predictions, or predict held-out regimes from all the others; exit code 0 also for a wrong prediction."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument(
        "--regimes",
        nargs="+",
        metavar="MODEL@RATIO",
        help="hold these regimes out, after the fact (default: those of the predict phase, else the largest model)",
    )
    parser.add_argument(
        "--prediction", type=Path, nargs="+", help="files of `study predict` (default: all registered ones)"
    )
    add_without(parser)
    options = parser.parse_args(argv)
    console = make_console()
    with Store(options.output / STORE_NAME) as store:
        dataset = from_store(store).without(options.without)
        made = [] if options.regimes else predictions(store, options.prediction)
    for path, content in made:
        _print_score(console, path, content, dataset)
    if not made:
        _hold_out(console, dataset, options.regimes)
    return 0


def _print_score(console: Console, path: Path, content: dict[str, Any], dataset: Dataset) -> None:
    section = registered(path.name, content, dataset)
    for warning in section.warnings:
        console.print(f"warning: {warning}", markup=False)
    for table in section.tables:
        print_table(console, table.header, table.rows, table.caption or section.title)
    for sentence in section.text:
        console.print(sentence, markup=False, highlight=False)


def _hold_out(console: Console, dataset: Dataset, chosen: list[str] | None) -> None:
    """After the fact: fit without some regimes, and predict them."""
    held_out = _held_out(dataset.phases.get("predict", []), dataset, chosen)
    data = observations(dataset)
    regimes = {record.id: record.regime for record in dataset.records}
    mask = np.array([regimes[run.split()[0]] in held_out for run in data.runs])
    if not mask.any():
        raise UserError(f"no finished run in {', '.join(map(str, sorted(held_out)))}; run the study to its end first")
    rows = []
    results = verification(data, mask, noise_floor(dataset))
    for kind, predicted in results.items():
        for i in range(len(predicted.data)):
            inside = predicted.low[i] <= predicted.data.loss[i] <= predicted.high[i]
            rows.append(
                [
                    kind,
                    data.optimizers[predicted.data.index[i]],
                    f"{predicted.data.n[i]:,.0f}",
                    f"{predicted.data.d[i]:.3g}",
                    f"{predicted.predicted[i]:.4f}",
                    f"{predicted.low[i]:.4f} to {predicted.high[i]:.4f}",
                    f"{predicted.data.loss[i]:.4f}",
                    f"{predicted.predicted[i] - predicted.data.loss[i]:+.4f}",
                    "yes" if inside else "no",
                    predicted.data.runs[i],
                ]
            )
    print_table(console, HEADER, rows, f"{dataset.name}: predicted without {', '.join(map(str, sorted(held_out)))}")
    for kind, predicted in results.items():
        console.print(
            f"{kind} law: error {predicted.rmse:.4f}, {predicted.coverage:.0%} of {len(predicted.data)} losses inside "
            "their 90% interval"
        )
    console.print("Predicted after the fact from the other runs; `study predict` writes predictions before the runs.")


def _held_out(predicted: list[str], dataset: Dataset, chosen: list[str] | None) -> set[Regime]:
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
