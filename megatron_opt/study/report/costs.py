"""What a loss costs in seconds and bytes, beside what it costs in tokens."""

from __future__ import annotations

from megatron_opt.report.blocks import Section, Series, colors
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
    color = colors(dataset.optimizers)
    for regime in dataset.regimes[-1:]:
        series = []
        for name, record, curve in dataset.best_curves(regime):
            seconds = record.results.get("train_time_s")
            last = max((p["iteration"] for p in curve.valid), default=0)
            points = [
                (seconds * p["iteration"] / last, p["loss"], record.id)
                for p in (curve.valid if seconds and last else ())
                if p.get("loss") is not None
            ]
            if points:
                series.append(Series.of(name, color[name], points, "runs"))
        title = f"Validation loss against training time, {regime}"
        section.plot(f"loss-over-time-{regime}", title, "seconds", "validation loss", series)
    series = []
    for name in dataset.optimizers:
        points = sorted(
            (float(cell.record.parameters), cell.record.results["peak_memory_bytes"] / 1e6, cell.record.id)
            for (optimizer, _), cell in dataset.best().items()
            if optimizer == name and cell.record.results.get("peak_memory_bytes")
        )
        if points:
            series.append(Series.of(name, color[name], points, "runs", line=False))
    x = "non-embedding parameters"
    section.plot("peak-memory", "Peak memory against size", x, "MB", series, x_log=True, y_log=True)
    return section
