"""Final loss against the learning rate, with the cliff where runs diverge."""

from __future__ import annotations

from megatron_opt.report.blocks import Section, Series, colors
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record

MOST_PLOTS = 12


def _slice(records: list[Record], center: Record) -> list[Record]:
    rest = {key: value for key, value in center.hyper.items() if key != "lr"}
    on_slice = [
        r
        for r in records
        if r.optimizer == center.optimizer
        and r.regime == center.regime
        and r.seed == center.seed
        and "lr" in r.hyper
        and {k: v for k, v in r.hyper.items() if k != "lr"} == rest
    ]
    return sorted(on_slice, key=lambda r: r.hyper["lr"])


def lr_sensitivity(dataset: Dataset) -> Section:
    """One plot a regime: loss over lr around each optimizer's best configuration, crosses where it
    diverged.
    """
    section = Section(
        "Learning-rate sensitivity",
        [
            "All else as in each optimizer's best configuration. Crosses at the top are runs that "
            "diverged: the cliff "
            "often begins one step above the optimum."
        ],
    )
    color = colors(dataset.optimizers)
    best = dataset.best()
    by_cell: dict[tuple[str, Regime], list[Record]] = {}
    for record in dataset.finished:
        by_cell.setdefault((record.optimizer, record.regime), []).append(record)
    for regime in dataset.regimes:
        series = []
        for name in dataset.optimizers:
            if (name, regime) not in best:
                continue
            runs = _slice(by_cell[name, regime], best[name, regime].record)
            if len(runs) < 2:
                continue
            good = [(r.hyper["lr"], r.loss, r.id) for r in runs if r.loss is not None]
            series.append(Series.of(name, color[name], good, "runs"))
            bad = [(r.hyper["lr"], 0.0, r.id) for r in runs if r.loss is None]
            if bad:
                series.append(Series.of(f"{name} diverged", color[name], bad, "runs", line=False, crosses=True))
        title, y = f"Learning-rate sensitivity, {regime}", "final validation loss"
        section.plot(f"lr-sensitivity-{regime}", title, "learning rate", y, series, x_log=True)
    if len(section.plots) > MOST_PLOTS:
        section.text.append(f"The largest {MOST_PLOTS} of {len(section.plots)} regimes are drawn.")
        section.plots = section.plots[-MOST_PLOTS:]
    return section
