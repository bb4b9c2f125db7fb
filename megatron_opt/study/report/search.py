"""How the search went: every sweep, what it decided, and what was then predicted."""

from __future__ import annotations

import math
from typing import Any

from megatron_opt.report.blocks import Section
from megatron_opt.study.dataset import Dataset


def search(dataset: Dataset) -> Section:
    """Sweeps, verdicts on sensitivity, and predicted hyperparameters, from the scheduler's record."""
    section = Section("Search")

    def steps(kind: str) -> list[dict[str, Any]]:
        return [step for step in dataset.trace if step["kind"] == kind]

    section.table(
        ["phase", "regime", "optimizer", "swept", "from", "best", "gain", "moved", "grid widened by"],
        [
            [
                s["phase"],
                s["regime"],
                s["optimizer"],
                s["coordinate"],
                _show(s["before"]),
                _show(s["best"]),
                "from divergence" if math.isinf(s["gain"]) else f"{s['gain']:.4f}",
                "yes" if s["adopted"] else "no",
                str(s.get("widened", 0)),
            ]
            for s in steps("sweep")
        ],
        "Coordinate descent: one row a sweep; it moves only for a gain above Δ1.",
    )
    section.table(
        ["optimizer", "hyperparameter", "scaling", "one value for all", "costs at most", "optimum in each regime"],
        [
            [
                v["optimizer"],
                v["hyperparameter"],
                _verdict(v),
                _show(v["value"]),
                _excess(v["excess"]),
                ", ".join(f"{regime} {_show(value)}" for regime, value in v["optima"].items()),
            ]
            for v in steps("sensitivity")
        ],
        "Insensitive: one value lies within Δ2 of the optimum in every regime.",
    )
    section.table(
        ["regime", "optimizer", "hyperparameters", "from laws"],
        [
            [
                p["regime"],
                p["optimizer"],
                ", ".join(f"{k} {_show(v)}" for k, v in p["point"].items()),
                ", ".join(p["from_laws"]) or "none",
            ]
            for p in steps("prediction")
        ],
        "Hyperparameters of the target runs, predicted from the tuned regimes.",
    )
    section.warnings = [
        f"The search of {s['optimizer']} in {s['regime']} ended at its budget of runs ({s['runs']}), not at an optimum."
        for s in steps("budget")
    ]
    return section


def _excess(value: float | None) -> str:
    return "not tried everywhere" if value is None else "diverges" if math.isinf(value) else f"{value:.4f}"


def _verdict(step: dict[str, Any]) -> str:
    if step.get("edges"):
        return f"on the edge in {', '.join(step['edges'])}: optimum beyond"
    return "sensitive" if step["sensitive"] else "insensitive"


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
