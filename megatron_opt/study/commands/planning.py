"""`study plan`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from rich.console import Console

from megatron_opt.report.terminal import make_console, print_table
from megatron_opt.study.commands.checking import check_study, note_small_weights
from megatron_opt.study.commands.pricing import Prices, add_price_options, words
from megatron_opt.study.executors.local import LocalExecutor
from megatron_opt.study.expected import expected_runs
from megatron_opt.study.planning import plan_costs
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.spec import Study
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study


def main(argv: list[str], prog: str) -> int:
    """Print runs, FLOPs, tokens and expected hours of each phase."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("study", type=Path, help="study file (YAML)")
    parser.add_argument("--output", type=Path, help="folder of earlier runs, whose measured speed gives the hours")
    add_price_options(parser)
    options = parser.parse_args(argv)
    study = read_study(options.study)
    check_study(study)
    records = []
    if options.output is not None and (options.output / STORE_NAME).is_file():
        with Store(options.output / STORE_NAME) as store:
            records = store.runs(status="completed")
    costs = plan_costs(study, records)
    console = make_console()
    rows = [[c.phase, c.optimizer, *_cells(c.least, c.most, c.tokens, c.flops, c.hours)] for c in costs]
    hours = [c.hours for c in costs if c.hours is not None]
    least, most = sum(c.least for c in costs), sum(c.most for c in costs)
    tokens, flops = math.fsum(c.tokens for c in costs), math.fsum(c.flops for c in costs)
    rows.append(["total", "", *_cells(least, most, tokens, flops, math.fsum(hours) if hours else None)])
    print_table(
        console,
        ["phase", "optimizer", "runs", "tokens", "FLOPs", "hours"],
        rows,
        f"{study.name}: {len(study.models)} models, {len(study.regimes())} regimes, baseline {study.baseline}",
    )
    if note := note_small_weights(study):
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if options.cluster is not None:
        _price(console, study, Prices(options.cluster, options.price))
        return 0
    if not hours:
        console.print("Hours are unknown until a run has finished (`--output`) or `executor: flops_per_s:` is given.")
        return 0
    slots = study.executor.jobs or (LocalExecutor(study.executor).slots if study.executor.kind == "local" else 1)
    total = sum(hours)
    console.print(f"At most {total:.2f} hours of runs, about {total / slots:.2f} hours with {slots} at once.")
    if study.max_hours is not None and total * study.executor.ranks > study.max_hours:
        console.print(f"This may exceed the budget of {study.max_hours:g} hours, at which no further run is started.")
    return 0


def _price(console: Console, study: Study, prices: Prices) -> None:
    """GPU-hours and dollars of each phase and model, on a cluster, by the cost model."""
    totals: dict[tuple[int, str, str], list[float]] = {}
    for index, phase in enumerate(study.phases):
        for name in study.optimizers:
            least, most, runs = expected_runs(study, phase, name)
            for run in runs:
                total = totals.setdefault((index, phase.title, run.regime.model), [0.0, 0.0, 0.0, 0.0])
                hours = prices.hours(study, run) / len(runs)
                for k, value in enumerate((least / len(runs), most / len(runs), least * hours, most * hours)):
                    total[k] += value
    rows = [
        [
            kind,
            model,
            words(a, b, "{:.0f}"),
            words(c, d, "{:,.0f}"),
            words(c * prices.price, d * prices.price, "{:,.0f}"),
        ]
        for (_, kind, model), (a, b, c, d) in totals.items()
    ]
    gpus = study.executor.ranks * study.executor.nodes
    print_table(
        console,
        ["phase", "model", "runs", "GPU-hours", "dollars"],
        rows,
        f"{study.name} on {prices.cluster.title}, {gpus} GPUs a run, ${prices.price:g} a GPU-hour",
    )
    low, high = (sum(total[k] for total in totals.values()) for k in (2, 3))
    console.print(
        f"Together {words(low, high, '{:,.0f}')} GPU-hours, ${words(low * prices.price, high * prices.price, '{:,.0f}')}; the "
        "ends are the least and the most that the searches may take, at the batch sizes they start from.",
        markup=False,
        highlight=False,
    )
    reach = prices.spread()
    if reach is not None:
        console.print(
            f"ESTIMATE: published runs took {reach[0]:.2f} to {reach[1]:.2f} times the predicted step on such clusters, "
            "and failures, evaluations and queues come on top.",
            markup=False,
            highlight=False,
        )


def _cells(least: int, most: int, tokens: float, flops: float, hours: float | None) -> list[str]:
    runs = str(most) if least == most else f"{least} to {most}"
    return [runs, f"{tokens:.3g}", f"{flops:.3g}", "unknown" if hours is None else f"{hours:.2f}"]
