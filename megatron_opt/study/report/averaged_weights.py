"""Losses of averaged weights beside those of the raw ones, run by run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_opt.report.blocks import Section, Table
from megatron_opt.study import downstream
from megatron_opt.study.dataset import Dataset, Seeded
from megatron_opt.study.fits.significance import LEVEL, Cells, Comparison, compare_pairs, holm
from megatron_opt.study.report.scaling import interval_text, p_text
from megatron_opt.study.spec import Regime

_RAW = ""


def averaged_weights(dataset: Dataset) -> Section:
    """Of each optimizer's best configuration; empty where no run averaged its weights."""
    section = Section("Averaged weights")
    results = {record.id: record.results for record in dataset.records}
    table: dict[tuple[str, str], dict[tuple[str, Regime], Seeded]] = {}
    for (name, regime), cell in dataset.best().items():
        for weights in _kinds(results[cell.ids[0]]):
            both = [_losses(results[run], weights) for run in cell.ids]
            pairs = [one for one in both if one is not None]
            if len(pairs) == len(both):
                for kind, losses in zip((_RAW, weights), zip(*pairs)):
                    mine = table.setdefault((name, weights), {})
                    mine[kind, regime] = Seeded(losses, cell.seeds, cell.ids, cell.chosen)
    rows = [(key, one, cells) for key, cells in table.items() for one in _tested(cells, key[1])]
    if not rows:
        return section
    adjusted = holm([one.p for _, one, _ in rows])
    rows = [(key, replace(one, adjusted=p), cells) for (key, one, cells), p in zip(rows, adjusted)]
    section.text = [
        "The same runs with averaged weights: the moving average that the run kept, or the mean of its last checkpoints. Both losses "
        "are of one measure. The gain is the raw weights' loss less that of the averaged, over the seeds of the best configuration; "
        f"{LEVEL:.0%} intervals by the spread of that difference over seeds, pooled over an optimizer's regimes, p after Holm's "
        "correction over the table."
    ]
    header = [
        "regime",
        "optimizer",
        "weights",
        "raw",
        "averaged",
        "gain",
        f"{LEVEL:.0%} interval",
        "p (Holm)",
        "averaged are",
        "runs",
    ]
    shown = [
        [
            str(one.regime), name, weights, f"{cells[_RAW, one.regime].loss:.4f}", f"{cells[weights, one.regime].loss:.4f}",
            f"{one.gain:+.4f}", interval_text(one), p_text(one.adjusted),
            one.verdict, ", ".join(one.runs),
        ]
        for (name, weights), one, cells in sorted(rows, key=lambda row: dataset.regimes.index(row[1].regime))
    ]  # fmt: skip
    section.tables.append(Table(header, shown))
    return section


def _kinds(results: dict[str, Any]) -> Iterator[str]:
    yield from downstream.averaged(results)
    if downstream.EMA not in downstream.averaged(results) and results.get("final_valid_ema_loss") is not None:
        yield downstream.EMA


def _losses(results: dict[str, Any], weights: str) -> tuple[float, float] | None:
    """Of raw and averaged weights: by the evaluation, or by the training, which evaluates its moving average too."""
    found = [
        one.get(downstream.LOSS) for one in (downstream.last(results), downstream.averaged(results).get(weights, {}))
    ]
    if all(found):
        raw, mean = (one["metrics"]["loss"]["value"] for one in found if one)
        return raw, mean
    if weights == downstream.EMA and results.get("final_valid_ema_loss") is not None:
        return results["final_valid_loss"], results["final_valid_ema_loss"]
    return None


def _tested(cells: Cells, weights: str) -> list[Comparison]:
    """Pairs of one optimizer alone, so that the noise is that of the difference within a run."""
    return compare_pairs(cells, [(weights, _RAW, regime) for kind, regime in cells if kind == weights])
