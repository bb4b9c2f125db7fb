"""Mistakes that make comparisons of optimizers wrong, looked for in the runs themselves."""

from __future__ import annotations

from megatron_opt.study.dataset import Best, Dataset
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record

MOST = 8
"""sentences of one kind"""
NORMS = 0.02
"""share of parameters in norms and biases, which the plan does not count"""


def pitfalls(dataset: Dataset) -> list[str]:
    """Warnings, the gravest kind first; at most MOST of each kind, with the count of the rest."""
    best = dataset.best()
    cells: dict[tuple[str, Regime], list[Record]] = {}
    for record in dataset.finished:
        cells.setdefault((record.optimizer, record.regime), []).append(record)
    sentences: list[str] = []
    for kind in (
        _no_baseline(dataset, best),
        _effort(dataset, cells),
        _weak_baseline(dataset, cells, best),
        _edges(cells, best),
        _early(dataset),
        _sizes(dataset),
        _failed(dataset),
    ):
        sentences += kind[:MOST]
        if len(kind) > MOST:
            sentences.append(f"… and {len(kind) - MOST} more of this kind.")
    return sentences


def _no_baseline(dataset: Dataset, best: dict[tuple[str, Regime], Best]) -> list[str]:
    return [
        f"{regime} has no result of the baseline {dataset.baseline}: nothing there can be called a gain."
        for regime in dataset.regimes
        if (dataset.baseline, regime) not in best and any(r == regime for _, r in best)
    ]


def _effort(dataset: Dataset, cells: dict[tuple[str, Regime], list[Record]]) -> list[str]:
    sentences: list[str] = []
    if not dataset.effort_known:
        return sentences
    for regime in dataset.regimes:
        counts = {name: len(cells[name, regime]) for name in dataset.optimizers if (name, regime) in cells}
        if counts and max(counts.values()) > 1.2 * min(counts.values()):
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            sentences.append(
                f"Unequal tuning effort in {regime}: {shown} runs. The best of more runs is lower by chance."
            )
    return sentences


def _weak_baseline(
    dataset: Dataset, cells: dict[tuple[str, Regime], list[Record]], best: dict[tuple[str, Regime], Best]
) -> list[str]:
    """A learning rate is tuned when values on both sides of the best one were tried, or the cliff was
    seen.
    """
    sentences = []
    for (name, regime), cell in best.items():
        if not dataset.effort_known or name != dataset.baseline or "lr" not in cell.record.hyper:
            continue
        tried = {record.hyper.get("lr") for record in cells[name, regime]}
        if len(tried) < 3 and any(len(cells.get((other, regime), ())) > 2 for other in dataset.optimizers):
            sentences.append(
                f"The baseline {name} tried {len(tried)} learning rates in {regime}; an under-tuned "
                "baseline makes "
                "every other optimizer look better."
            )
    return sentences


def _edges(cells: dict[tuple[str, Regime], list[Record]], best: dict[tuple[str, Regime], Best]) -> list[str]:
    sentences = []
    for (name, regime), cell in best.items():
        for key, value in cell.record.hyper.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            tried = sorted(
                {
                    float(r.hyper[key])
                    for r in cells[name, regime]
                    if isinstance(r.hyper.get(key), (int, float))
                    and all(r.hyper.get(k) == v for k, v in cell.record.hyper.items() if k != key)
                }
            )
            if len(tried) > 2 and value in (tried[0], tried[-1]) and value != 0:
                side = "smallest" if value == tried[0] else "largest"
                sentences.append(
                    f"The best {key} of {name} in {regime}, {value:g}, is the {side} that was tried; "
                    "the true optimum may lie beyond."
                )
    return sorted(sentences, key=lambda text: not text.startswith("The best lr"))


def _early(dataset: Dataset) -> list[str]:
    sentences = []
    for record in dataset.finished:
        seen = record.results.get("tokens")
        if seen is not None and record.status == "completed" and seen < 0.999 * record.tokens:
            sentences.append(
                f"Run {record.id} ({record.optimizer} {record.regime}) stopped at "
                f"{seen / record.tokens:.0%} of its "
                "budget; losses compare only at the end of the schedule."
            )
        ratio = record.hyper.get("min_lr_ratio", 0)
        if isinstance(ratio, (int, float)) and ratio > 0.2:
            sentences.append(
                f"Run {record.id} ({record.optimizer} {record.regime}) ends at {ratio:.0%} of its "
                "learning rate; "
                "rankings flip while it decays."
            )
    return sentences


def _sizes(dataset: Dataset) -> list[str]:
    wrong = {
        (r.regime.model, r.parameters, r.results["params_non_embedding"])
        for r in dataset.finished
        if abs((r.results.get("params_non_embedding") or r.parameters) / r.parameters - 1) > NORMS
    }
    return [
        f"Model {model} was planned with {planned:,} non-embedding parameters and trained with "
        f"{real:,}; token budgets "
        "follow the plan. Give `non_embedding_parameters:` in the study file."
        for model, planned, real in sorted(wrong)
    ]


def _failed(dataset: Dataset) -> list[str]:
    failed = [record for record in dataset.records if record.status == "failed"]
    return [f"Run {r.id} ({r.optimizer} {r.regime}) failed: {r.reason}" for r in failed]
