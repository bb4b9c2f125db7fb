"""The finished runs of a study in the form that fits and reports read, wherever they came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_opt.errors import UserError, nearest_or_all
from megatron_opt.study.curves import Curve
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import FINISHED, Record, Store


@dataclass(frozen=True)
class Seeded:
    """Final losses of one configuration over seeds.

    A configuration that won among several is lower by luck on the seed that chose it: that loss is left out, unless it is
    the only one.
    """

    losses: tuple[float, ...]
    """one a seed"""
    seeds: tuple[int, ...] = ()
    """the seed of each loss"""
    ids: tuple[str, ...] = ()
    """the run of each loss"""
    chosen: bool = False
    """the one loss is that of the seed which chose the configuration: too low, and no part of any test"""

    @property
    def loss(self) -> float:
        """Mean over seeds, so that a lucky seed does not decide."""
        return sum(self.losses) / len(self.losses)

    @property
    def by_seed(self) -> dict[int, float]:
        return dict(zip(self.seeds, self.losses))


@dataclass(frozen=True, kw_only=True)
class Best(Seeded):
    """The best configuration of one optimizer in one regime."""

    record: Record
    """the run that was chosen"""
    runs: int
    """finished runs this optimizer had in this regime: its tuning effort"""


def best_of_cell(records: list[Record]) -> Best | None:
    """The best configuration among the finished runs of one optimizer in one regime; None when all diverged."""
    good = [record for record in records if record.loss is not None]
    if not good:
        return None
    tried: dict[int, set[str]] = {}
    for record in records:
        tried.setdefault(record.seed, set()).add(json.dumps(record.hyper, sort_keys=True))
    finished = {record.seed for record in good}
    # The search ran on the seed that saw most configurations.
    first = min(finished, key=lambda seed: (-len(tried[seed]), seed))
    winner = min((r for r in good if r.seed == first), key=lambda r: r.loss or math.inf)
    same = sorted((r for r in good if r.hyper == winner.hyper), key=lambda r: r.seed)
    selected = len(tried[first]) > 1
    fair = [r for r in same if r.seed != first] if selected else same
    used = fair or [winner]
    return Best(
        record=winner,
        losses=tuple(r.loss for r in used if r.loss is not None),
        runs=len(records),
        seeds=tuple(r.seed for r in used),
        ids=tuple(r.id for r in used),
        chosen=selected and not fair,
    )


@dataclass
class Dataset:
    """Runs, their curves on demand, and the baseline they are measured against."""

    name: str
    baseline: str
    records: list[Record]
    curve: Callable[[str], Curve | None] = field(default=lambda run: None)
    attribution: str = ""
    phases: dict[str, list[str]] = field(default_factory=dict)
    planned: dict[Regime, int] = field(default_factory=dict)
    """regimes that the study file asks for, whether a run of theirs is there or not, and the parameters of their models"""
    samples: dict[str, str] = field(default_factory=dict)
    """run → what it said after the study's prompt"""
    trace: list[dict[str, Any]] = field(default_factory=list)
    """decisions of the search, as the scheduler recorded them"""
    tokens_per_parameter: float = 20.0
    target: tuple[float, tuple[float, ...]] = (7e9, (1.0, 2.0, 4.0, 8.0, 16.0))
    """parameters and Chinchilla ratios to extrapolate to"""
    cluster: str | None = None
    """a cluster, by name or file, for which reports work out times"""
    effort_known: bool = True
    """all runs that were ever made are here, so that run counts can be compared"""
    looks: int = 1
    """how often a seeds phase may have looked at its results before it stopped"""
    margin: float = 3e-3
    """Δ1: differences below it do not matter"""
    settings: dict[str, Any] = field(default_factory=dict)
    """the same of the study as a whole, as its store has them and exports carry them"""
    _best: tuple[list[Record], dict[tuple[str, Regime], Best]] | None = field(default=None, repr=False, compare=False)

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
        there = {record.regime for record in self.records}
        return [regime for regime in self.sizes if regime in there]

    @property
    def sizes(self) -> dict[Regime, int]:
        """Parameters of every regime that has runs or waits for them; by model size, then ratio."""
        size = self.planned | {record.regime: record.parameters for record in self.records}
        return {one: size[one] for one in sorted(size, key=lambda r: (size[r], r.model, r.ratio, r.epochs))}

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(regime.model for regime in self.regimes))

    def best(self) -> dict[tuple[str, Regime], Best]:
        """(optimizer, regime) → its best configuration: the search's seed decides, the other seeds give its loss."""
        if self._best is None or self._best[0] is not self.records:
            groups: dict[tuple[str, Regime], list[Record]] = {}
            for record in self.finished:
                groups.setdefault((record.optimizer, record.regime), []).append(record)
            best = {key: best_of_cell(records) for key, records in groups.items()}
            self._best = self.records, {key: one for key, one in best.items() if one is not None}
        return self._best[1]

    def best_curves(self, regime: Regime) -> Iterator[tuple[str, Record, Curve]]:
        """(optimizer, run, curve) of each best configuration in one regime whose curve is known."""
        for name in self.optimizers:
            cell = self.best().get((name, regime))
            if cell is not None and (curve := self.curve(cell.record.id)) is not None:
                yield name, cell.record, curve

    def without(self, regimes: Iterable[str]) -> Dataset:
        """The same without some regimes, MODEL@RATIO; raises UserError for one that has no runs."""
        left = [Regime.parse(text) for text in regimes]
        for regime in left:
            if regime not in self.regimes:
                hint = nearest_or_all(str(regime), map(str, self.regimes), quote="")
                raise UserError(f"--without {regime}: no runs of it; {hint}")
        return replace(self, records=[r for r in self.records if r.regime not in left], _best=None)

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
    records, settings = store.runs(), store.settings()
    dataset = Dataset(
        settings.get("name", store.path.parent.name),
        settings.get("baseline", "adamw"),
        records,
        store.curve,
        phases=store.phases(),
        planned={Regime.parse(text): n for text, n in store.meta("regimes", {}).items()},
        samples=store.meta("samples", {}),
        trace=settings.get("trace", []),
        target=tuple(settings.get("target", Dataset.target)),
        tokens_per_parameter=settings.get("tokens_per_parameter", 20.0),
        cluster=settings.get("cluster"),
        looks=settings.get("looks", 1),
        margin=settings.get("margin", Dataset.margin),
        settings=settings,
    )
    dataset.check_tokenizers()
    return dataset
