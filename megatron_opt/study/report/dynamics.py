"""Effective learning rate and weight norm during training, from what runs log for each kind of matrix.

For scale-invariant weights, weight decay acts through the angular update of a step: in equilibrium
‖W‖ ∝ √(η/2λ) and the angle is √(2ηλ(1−β1)/(1+β1)) (arXiv 2606.16899).
"""

from __future__ import annotations

import math
from typing import Any

from megatron_opt.report.blocks import Section, Series, colors
from megatron_opt.study.dataset import Dataset

KEYS = {
    "angular_update": ("Angular update of a step", "radians"),
    "weight_norm": ("Weight norm", "Frobenius norm"),
}


def dynamics(dataset: Dataset) -> Section:
    """Mean over matrix kinds of each optimizer's best run in the largest regime, and the table of
    every kind.
    """
    section = Section("Effective learning rate and weight norm")
    best, color = dataset.best(), colors(dataset.optimizers)
    regimes = [regime for regime in reversed(dataset.regimes) if (dataset.baseline, regime) in best]
    if not regimes:
        return section
    regime = regimes[0]
    rows = []
    for key, (title, unit) in KEYS.items():
        series = []
        for name, run, curve in dataset.best_curves(regime):
            points = [(p["iteration"], v) for p in curve.train if (v := by_matrix(p, key))]
            if not points:
                continue
            means = [(float(iteration), math.fsum(v.values()) / len(v), run.id) for iteration, v in points]
            series.append(Series.of(name, color[name], means, "runs", points=False))
            rows += [
                [name, kind, title.lower(), f"{value:.3g}", _expected(key, run.hyper)]
                for kind, value in sorted(points[len(points) // 2][1].items())
            ]
        name = f"{key.replace('_', '-')}-{regime}"
        section.plot(name, f"{title}, {regime}", "iteration", unit, series, y_log=True)
    if rows:
        section.text.append("The angular update is the step that training really takes on scale-invariant weights.")
        section.table(["optimizer", "matrices", "what", "halfway", "equilibrium at full lr"], rows)
    return section


def by_matrix(point: dict[str, Any], key: str) -> dict[str, float]:
    """A logged quantity by kind or group of matrices; the angle of a step is ‖ΔW‖/‖W‖ where it is not logged."""
    if isinstance(point.get(key), dict):
        return point[key]
    values = {}
    for name, group in (point.get("groups") or {}).items():
        if key in group:
            values[name] = group[key]
        elif key == "angular_update" and group.get("weight_norm") and "update_norm" in group:
            values[name] = group["update_norm"] / group["weight_norm"]
    return values


def _expected(key: str, hyper: dict[str, Any]) -> str:
    """√(2ηλ(1−β1)/(1+β1)) where η, λ and β1 are known."""
    lr, decay, beta = hyper.get("lr"), hyper.get("weight_decay"), hyper.get("momentum", hyper.get("beta1"))
    if key != "angular_update" or not lr or not decay or beta is None:
        return "–"
    return f"{math.sqrt(2 * lr * decay * (1 - beta) / (1 + beta)):.3g}"
