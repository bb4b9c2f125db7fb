"""Loss against tokens: each optimizer's best run, and beside it every learning rate of its sweep."""

from __future__ import annotations

from megatron_opt.report.blocks import Section, Series, colors
from megatron_opt.study.dataset import Dataset

MOST_PLOTS, MOST_POINTS = 12, 200


def loss_curves(dataset: Dataset) -> Section:
    """Validation loss (lines with points) and smoothed training loss (thin, dashed) of the best run
    of each cell.
    """
    section = Section(
        "Loss curves",
        [
            "Best run of each optimizer. Rankings often flip while the learning rate decays, so only "
            "the last point of a "
            "curve compares optimizers."
        ],
    )
    color = colors(dataset.optimizers)
    regimes = dataset.regimes[-MOST_PLOTS:]
    for regime in regimes:
        series = []
        for name, record, curve in dataset.best_curves(regime):
            for points, kind in ((curve.valid, "valid"), (curve.train, "train")):
                points = [p for p in points if p.get("loss") is not None and p.get("tokens") is not None]
                if kind == "train":
                    points = _smooth(points)
                if points:
                    rows, style = [(p["tokens"], p["loss"], record.id) for p in points], kind == "train"
                    series.append(Series.of(f"{name} {kind}", color[name], rows, "runs", dash=style, points=not style))
        limits = _range(series) if series else None
        section.plot(f"loss-curves-{regime}", f"Loss curves, {regime}", "tokens", "loss", series, y_range=limits)
    if len(regimes) < len(dataset.regimes):
        section.text.append(f"The largest {len(regimes)} of {len(dataset.regimes)} regimes are drawn.")
    return section


def _smooth(points: list[dict]) -> list[dict]:
    """Means of equal windows, at most MOST_POINTS of them."""
    window = -(-len(points) // MOST_POINTS) if points else 1
    smooth = []
    for start in range(0, len(points), window):
        part = points[start : start + window]
        smooth.append({"tokens": part[-1]["tokens"], "loss": sum(p["loss"] for p in part) / len(part)})
    return smooth


def _range(series: list[Series]) -> tuple[float, float]:
    """The losses after the first eighth of training: the start would flatten everything else."""
    last = max(one.x[-1] for one in series)
    ys = [y for one in series for x, y in zip(one.x, one.y) if x >= last / 8]
    pad = 0.05 * (max(ys) - min(ys)) or 0.05
    return min(ys) - pad, max(ys) + pad
