"""`study predict`: predictions with intervals in a file, before the runs; `study next`: the runs that would tell most."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opt.errors import UserError
from megatron_opt.report.terminal import make_console, print_table
from megatron_opt.study.commands.pricing import Prices, add_price_options
from megatron_opt.study.dataset import from_store
from megatron_opt.study.fits.next_runs import NextRun, next_runs
from megatron_opt.study.fits.noise import noise_floor
from megatron_opt.study.fits.observations import observations
from megatron_opt.study.fits.statement import predict as predict_at
from megatron_opt.study.prediction import law_of, load
from megatron_opt.study.registration import make, refuse_late, register, targets_of
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store


def main(argv: list[str], prog: str) -> int:
    """Write predictions of regimes where no run was started; refuses to replace a file or to predict after the fact."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument(
        "--regimes",
        nargs="+",
        metavar="MODEL@RATIO",
        help="regimes to predict (default: those of phases with `registered: true`)",
    )
    parser.add_argument(
        "--models", nargs="+", metavar="NAME=N", default=[], help="non-embedding parameters of further models"
    )
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="fit these and the baseline only")
    parser.add_argument("--to", type=Path, help="file to write (default: OUTPUT/prediction.json)")
    options = parser.parse_args(argv)
    path = options.to or options.output / "prediction.json"
    console = make_console()
    with Store(options.output / STORE_NAME) as store:
        dataset, targets = from_store(store), targets_of(store, options.regimes, options.models)
        refuse_late(dataset.records, targets)
        if path.exists():
            raise UserError(
                f"{path} is there already; a registered prediction is not replaced, so give another name by --to (both are kept)"
            )
        names = options.optimizers and [dataset.baseline, *(n for n in options.optimizers if n != dataset.baseline)]
        data, floor = observations(dataset, names), noise_floor(dataset)
        content = make(dataset, data, floor, law_of(data, floor), targets)
        register(store, path, content)
    for sentence in [*content["words"], *content["calibration"]]:
        console.print(sentence, markup=False, highlight=False)
    print_table(
        console,
        ["optimizer", "regime", "loss", "gain", "token speedup", "P(gain > 0)"],
        [_row(row, content["baseline"]) for row in content["predictions"]],
        f"Registered {content['written']}, from {len(content['data']['runs'])} runs.",
    )
    console.print(f"prediction: {path} (SHA-256 {content['sha256']})", soft_wrap=True, markup=False)
    console.print(f"After the runs: megatron-opt study verify {options.output}", soft_wrap=True, markup=False)
    return 0


def _row(row: dict, baseline: str) -> list[str]:
    def text(item: dict, digits: int) -> str:
        value, low, high = ("∞" if item[k] is None else f"{item[k]:.{digits}f}" for k in ("value", "low", "high"))
        return f"{value} ({low} to {high})"

    others = row["optimizer"] != baseline
    return [
        row["optimizer"],
        row["regime"],
        text(row["loss"], 4),
        text(row["gain"], 4) if others else "–",
        text(row["speedup"], 2) if others else "–",
        f"{row['chance_of_a_gain']:.0%}" if others else "–",
    ]


def rank(argv: list[str], prog: str) -> int:
    """Rank further runs by how much each narrows the gain at the target, an hour."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("study", nargs="?", help="folder of a study, its fits as JSON (default: the published study)")
    parser.add_argument("--optimizer", metavar="NAME", help="whose gain (default: every optimizer's)")
    parser.add_argument("--target", type=float, help="parameters of the gain (default: the study's target, or 7e9)")
    parser.add_argument("--ratio", type=float, help="Chinchilla ratio of the gain (default: the first of the study's)")
    parser.add_argument("--most-hours", type=float, metavar="H", help="leave out runs of more GPU-hours")
    parser.add_argument("--by", choices=("hour", "width"), default="hour", help="per GPU-hour, or by width alone")
    parser.add_argument("--top", type=int, default=10, help="runs to show (default: 10)")
    add_price_options(parser)
    options = parser.parse_args(argv)
    for flag, value in (("--target", options.target), ("--ratio", options.ratio), ("--top", options.top)):
        if value is not None and not value > 0:
            raise UserError(f"{flag} is {value}; it must be greater than 0")
    known, prices = load(options.study), Prices(options.cluster or "h100", options.price)
    own = known.dataset.target if known.dataset is not None else (7e9, (1.0,))
    per = known.tokens_per_parameter
    n, ratio = options.target or own[0], options.ratio or own[1][0]
    law = known.law()
    others = law.optimizers[1:]
    if options.optimizer is not None and options.optimizer not in others:
        raise UserError(f"{known.name} has no gain of {options.optimizer!r}; it has {', '.join(others)}")
    console = make_console()
    for name in [options.optimizer] if options.optimizer else others:
        said = predict_at(law, name, n, ratio * per * n)
        runs = next_runs(law, name, n, ratio * per * n, tokens_per_parameter=per, hours=prices.anywhere)
        if options.most_hours is not None:
            runs = [run for run in runs if (run.hours or 0.0) <= options.most_hours]
        runs.sort(key=lambda run: -(run.rate if options.by == "hour" else run.shrinkage))
        print_table(
            console,
            ["train", "parameters", "ratio", "GPU-hours", "width after", "narrower by", "per 1,000 GPU-hours"],
            [_candidate(run) for run in runs[: options.top]],
            f"{name}'s gain at {n:.3g} parameters and {ratio:g}x: {said.gain.text(4)}, 90% interval "
            f"{said.gain.high - said.gain.low:.4f} wide",
        )
    order = "width taken away a GPU-hour" if options.by == "hour" else "width"
    console.print(
        f"Ranked by {order}, under all forms of the hierarchical law; runs of two optimizers share a new seed. Hours are "
        f"{prices.cluster.title}'s by the cost model, without the search for hyperparameters. Widths are expectations: what a "
        "run shows may also widen the interval.",
        markup=False,
        highlight=False,
    )
    return 0


def _candidate(run: NextRun) -> list[str]:
    hours = run.hours or 0.0
    return [
        run.optimizer,
        f"{run.n:.3g}",
        f"{run.ratio:g}x",
        f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}",
        f"{run.width:.4f}",
        f"{run.shrinkage:.1%}",
        f"{1000 * run.rate:.4f}",
    ]
