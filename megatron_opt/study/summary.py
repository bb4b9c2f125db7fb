"""The result table: one row an optimizer and regime, every number with the run it came from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opt.study.dataset import Dataset


@dataclass(frozen=True)
class Row:
    """Best configuration of an optimizer in a regime and what it costs."""

    optimizer: str
    regime: str
    lr: float | None
    loss: float
    seeds: int
    tokens_per_s: float | None
    step_ms: float | None
    optimizer_ms: float | None
    """time of the optimizer in one step"""
    peak_memory_mb: float | None
    train_minutes: float | None
    runs: int
    diverged: int
    run: str
    tokens: int = 0
    unique_tokens: int = 0

    def cells(self) -> list[str]:
        return [
            self.regime,
            self.optimizer,
            "–" if self.lr is None else f"{self.lr:g}",
            f"{self.loss:.4f}",
            f"{self.tokens:.3g}" + (f", {self.unique_tokens:.3g} unique" if self.unique_tokens < self.tokens else ""),
            str(self.seeds),
            _number(self.tokens_per_s, ",.0f"),
            _number(self.step_ms, ".1f"),
            _number(self.optimizer_ms, ".2f"),
            _number(self.peak_memory_mb, ",.0f"),
            _number(self.train_minutes, ".2f"),
            f"{self.runs} ({self.diverged} diverged)" if self.diverged else str(self.runs),
            self.run,
        ]


HEADER = [
    "regime",
    "optimizer",
    "best lr",
    "valid loss",
    "tokens",
    "seeds",
    "tokens/s",
    "step ms",
    "optimizer ms",
    "peak MB",
    "train min",
    "runs",
    "run id",
]


def summary(dataset: Dataset) -> list[Row]:
    """One row for each (regime, optimizer) that has a result, best loss first within a regime."""
    order = {regime: i for i, regime in enumerate(dataset.regimes)}
    diverged: dict[tuple, int] = {}
    for record in dataset.finished:
        if record.status == "diverged":
            key = (record.optimizer, record.regime)
            diverged[key] = diverged.get(key, 0) + 1
    rows = []
    for (optimizer, regime), best in dataset.best().items():
        results = best.record.results
        step = results.get("step_time_s") or {}
        rows.append(
            (
                order[regime],
                best.loss,
                Row(
                    optimizer,
                    str(regime),
                    best.record.hyper.get("lr"),
                    best.loss,
                    len(best.losses),
                    results.get("tokens_per_s"),
                    _scaled(step.get("total"), 1e3),
                    _scaled(step.get("optimizer"), 1e3),
                    _scaled(results.get("peak_memory_bytes"), 1e-6),
                    _scaled(results.get("train_time_s"), 1 / 60),
                    best.runs,
                    diverged.get((optimizer, regime), 0),
                    " ".join(best.ids),
                    best.record.tokens,
                    best.record.unique_tokens,
                ),
            )
        )
    return [row for *_, row in sorted(rows, key=lambda item: item[:2])]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
