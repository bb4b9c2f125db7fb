"""The finished runs of a study in the form that fits and reports read, wherever they came from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.study.curves import Curve
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import FINISHED, Record, Store


@dataclass(frozen=True)
class Best:
    """The best configuration of one optimizer in one regime."""

    record: Record
    losses: tuple[float, ...]
    """final losses of this configuration, one a seed"""
    runs: int
    """finished runs this optimizer had in this regime: its tuning effort"""
    seeds: tuple[int, ...] = ()
    """the seed of each loss"""

    @property
    def loss(self) -> float:
        """Mean over seeds, so that a lucky seed does not decide."""
        return sum(self.losses) / len(self.losses)


@dataclass
class Dataset:
    """Runs, their curves on demand, and the baseline they are measured against."""

    name: str
    baseline: str
    records: list[Record]
    curve: Callable[[str], Curve | None] = field(default=lambda run: None)
    attribution: str = ""
    phases: dict[str, list[str]] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    """decisions of the search, as the scheduler recorded them"""
    tokens_per_parameter: float = 20.0
    target: tuple[float, tuple[float, ...]] = (7e9, (1.0, 2.0, 4.0, 8.0, 16.0))
    """parameters and Chinchilla ratios to extrapolate to"""
    effort_known: bool = True
    """all runs that were ever made are here, so that run counts can be compared"""

    @property
    def finished(self) -> list[Record]:
        return [record for record in self.records if record.status in FINISHED]

    @property
    def optimizers(self) -> list[str]:
        """The baseline first, then the others by name."""
        names = sorted({record.optimizer for record in self.records})
        return sorted(names, key=lambda name: name != self.baseline)

    @property
    def regimes(self) -> list[Regime]:
        """By model size, then ratio."""
        size = {record.regime: record.parameters for record in self.records}
        return sorted(size, key=lambda regime: (size[regime], regime.model, regime.ratio))

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(regime.model for regime in self.regimes))

    def best(self) -> dict[tuple[str, Regime], Best]:
        """(optimizer, regime) → its best configuration; a search run decides, its seeds are averaged."""
        groups: dict[tuple[str, Regime], list[Record]] = {}
        for record in self.finished:
            groups.setdefault((record.optimizer, record.regime), []).append(record)
        found = {}
        for key, records in groups.items():
            good = [record for record in records if record.loss is not None]
            if not good:
                continue
            first = min(record.seed for record in good)
            winner = min((r for r in good if r.seed == first), key=lambda r: r.loss or math.inf)
            same = [r for r in good if r.hyper == winner.hyper]
            losses = tuple(r.loss for r in same if r.loss is not None)
            found[key] = Best(winner, losses, len(records), tuple(r.seed for r in same))
        return found

    def check_tokenizers(self) -> None:
        """Losses per token compare only under one tokenizer; raises UserError otherwise."""
        seen: dict[str, Record] = {}
        for record in self.finished:
            digest = (record.results.get("tokenizer") or {}).get("sha256")
            if digest:
                seen.setdefault(digest, record)
        if len(seen) > 1:
            a, b = list(seen.values())[:2]
            raise UserError(
                f"runs {a.id} and {b.id} used different tokenizers, so their losses per token cannot be "
                "compared; keep one tokenizer a study"
            )


def from_store(store: Store) -> Dataset:
    """All runs of a store; raises UserError for mixed tokenizers."""
    records = store.runs()
    baseline = store.meta("baseline") or next((r.optimizer for r in records), "adamw")
    dataset = Dataset(
        store.meta("name", store.path.parent.name),
        baseline,
        records,
        store.curve,
        phases=store.phases(),
        trace=store.meta("trace", []),
        target=tuple(store.meta("target", Dataset.target)),
        tokens_per_parameter=store.meta("tokens_per_parameter", 20.0),
    )
    dataset.check_tokenizers()
    return dataset
