"""What a loss costs in seconds and bytes, beside what it costs in tokens."""

from __future__ import annotations

from megatron_opt.report.blocks import Plot, Section, Series, colors
from megatron_opt.study.dataset import Dataset


def costs(dataset: Dataset) -> Section:
    """Validation loss against training time in the largest regime, and peak memory against size."""
    section = Section(
        "Wall-clock and memory",
        [
            "The same runs by time: an optimizer that saves tokens may still lose by its own cost. "
            "Times compare only on "
            "the same machine."
        ],
    )
    best, color = dataset.best(), colors(dataset.optimizers)
    for regime in dataset.regimes[-1:]:
        series = []
        for name in dataset.optimizers:
            cell = best.get((name, regime))
            curve = dataset.curve(cell.record.id) if cell else None
            seconds = cell.record.results.get("train_time_s") if cell else None
            if cell is None or curve is None or not seconds:
                continue
            last = max((p["iteration"] for p in curve.valid), default=0)
            points = [p for p in curve.valid if p.get("loss") is not None]
            if last and points:
                series.append(
                    Series(
                        name,
                        [seconds * p["iteration"] / last for p in points],
                        [p["loss"] for p in points],
                        color[name],
                        runs=[cell.record.id] * len(points),
                    )
                )
        if series:
            section.plots.append(
                Plot(
                    f"loss-over-time-{regime}",
                    f"Validation loss against training time, {regime}",
                    "seconds",
                    "validation loss",
                    series,
                )
            )
    series = []
    for name in dataset.optimizers:
        sizes = sorted(
            (float(cell.record.parameters), cell.record.results["peak_memory_bytes"] / 1e6, cell.record.id)
            for (optimizer, _), cell in best.items()
            if optimizer == name and cell.record.results.get("peak_memory_bytes")
        )
        if sizes:
            series.append(
                Series(
                    name,
                    [p[0] for p in sizes],
                    [p[1] for p in sizes],
                    color[name],
                    line=False,
                    runs=[p[2] for p in sizes],
                )
            )
    if series:
        section.plots.append(
            Plot(
                "peak-memory",
                "Peak memory against size",
                "non-embedding parameters",
                "MB",
                series,
                x_log=True,
                y_log=True,
            )
        )
    return section
