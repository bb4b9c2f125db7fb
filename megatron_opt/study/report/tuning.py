"""Hyperparameter laws, and how the best learning rate moves with width and depth."""

from __future__ import annotations

import numpy as np

from megatron_opt.report.blocks import Section, Series, colors
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.dataset import Dataset


def hyper_laws(analysis: Analysis) -> Section:
    """h(N, D) = α·N^−A·D^−B: tuned values, the law along N at each ratio, the prediction for the
    target.
    """
    section = Section("Hyperparameter laws")
    if not analysis.hyper_laws:
        return section
    section.text.append(
        "Tuned values in each regime (points) and the law h = α·N^−A·D^−B at the lowest ratio (curve, 90% band of a "
        "tuned value). Where neighbours on the grid were tried the optimum is that of the parabola through them, "
        "else it is known to about half a step. Exponents are pooled over optimizers of a family; bands are scaled by a "
        "backtest on the largest size. The price is the loss at stake if the optimum lies at an end of the interval."
    )
    color, per = colors(analysis.dataset.optimizers), analysis.dataset.tokens_per_parameter
    for key in dict.fromkeys(law.hyperparameter for law in analysis.hyper_laws):
        laws = [law for law in analysis.hyper_laws if law.hyperparameter == key]
        one_size = len({size for law in laws for size in law.n}) == 1
        series = []
        for law in laws:
            ratio = float((law.d / law.n).min())
            if one_size:
                tokens = np.geomspace(law.d.min(), law.d.max() * 2, 30)
                sizes, x, points = np.full(30, law.n[0]), tokens, law.d
            else:
                sizes = np.geomspace(law.n.min(), max(analysis.target[0], law.n.max()), 30)
                tokens, x, points = ratio * sizes, sizes, law.n
            bands = np.array([law.interval(*cell) for cell in zip(sizes, tokens)])
            c = color[law.optimizer]
            series.append(Series(law.optimizer, points.tolist(), law.value.tolist(), c, line=False))
            curve = zip(x, law.predict(sizes, tokens).tolist(), *bands.T.tolist())
            series.append(Series.of("", c, curve, "low", "high", points=False))
        against, x_label = ("tokens", "tokens") if one_size else ("size", "non-embedding parameters")
        title = f"Tuned {key} against {against}"
        section.plot(f"hyper-law-{key}", title, x_label, key, series, x_log=True, y_log=True)
    n, ratios = analysis.target
    rows = []
    for law in analysis.hyper_laws:
        d = ratios[0] * per * n
        low, high = law.interval(n, d)
        copies, price = law.exponents(), law.price(n, d)
        rows.append(
            [
                law.optimizer,
                law.hyperparameter,
                *(f"{law.theta[i]:.2f} ({copies[0, i - 1]:.2f} to {copies[1, i - 1]:.2f})" for i in (1, 2)),
                f"{float(law.predict(n, d)):.3g}",
                f"{low:.3g} to {high:.3g}",
                "–" if price is None else f"{price:.4f}",
                f"{law.tested[0]} of {law.tested[1]}",
            ]
        )
    header = ["optimizer", "hyperparameter", "A (size)", "B (tokens)", f"at {n:.2g}, {ratios[0]:g}x", "90% interval"]
    section.table([*header, "price of its ends", "backtest: inside before scaling"], rows)
    return section


def transfer(dataset: Dataset) -> Section:
    """The best learning rate against width and against depth, other shape numbers mixed as they were run."""
    section = Section(
        "Transfer of the best learning rate",
        ["Flat lines transfer: the rate tuned on a small model is right for a large one."],
    )
    color, best = colors(dataset.optimizers), dataset.best()
    for flag, label in (("hidden-size", "width"), ("num-layers", "depth")):
        series = []
        for name in dataset.optimizers:
            points = sorted(
                (float(cell.record.config["flags"][flag]), cell.record.hyper["lr"], cell.record.id)
                for (optimizer, _), cell in best.items()
                if optimizer == name and flag in cell.record.config.get("flags", {}) and "lr" in cell.record.hyper
            )
            if len({x for x, *_ in points}) > 1:
                series.append(Series.of(name, color[name], points, "runs", line=False))
        title, y = f"Best learning rate against {label}", "best learning rate"
        section.plot(f"transfer-{label}", title, label, y, series, x_log=True, y_log=True)
    return section
