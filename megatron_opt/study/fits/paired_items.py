"""Whether two optimizers answer a task's items differently: McNemar's exact test, with the seeds of an item kept together.

An item that both answer alike says nothing. Of the others, each item's sum of differences over shared seeds is as likely
of either sign if the optimizers do not differ; the exact distribution of the total under those signs gives p. With one seed this
is McNemar's test (binomial over discordant items); with several, no item counts as more than one draw.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from megatron_opt.study import downstream
from megatron_opt.study.dataset import Best, Dataset, Seeded
from megatron_opt.study.fits.significance import LEVEL, compare_all, holm
from megatron_opt.study.spec import Regime


@dataclass(frozen=True)
class ItemTest:
    """Accuracy of `second` against `first` on one task in one regime."""

    regime: Regime
    task: str
    first: str
    second: str
    accuracies: tuple[float, float]
    """means over the shared seeds"""
    losses: tuple[float, float]
    """final validation losses"""
    items: int
    seeds: int
    gained: int
    lost: int
    """answers, over seeds, that only `second` and that only `first` has right"""
    p: float
    adjusted: float = 1.0
    """p after Holm's correction over its table"""
    p_seeds: float | None = None
    """of the difference over seeds, after the same correction; None where it cannot be said"""

    @property
    def significant(self) -> bool:
        return self.adjusted < 1 - LEVEL

    @property
    def disagrees(self) -> bool:
        """The lower loss has the lower accuracy."""
        (a, b), (x, y) = self.losses, self.accuracies
        return (a - b) * (x - y) > 0


def sign_flip(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p of right answers, booleans (seeds, items); McNemar's exact test for one seed."""
    d = second.astype(int).sum(0) - first.astype(int).sum(0)  # (items,)
    law = np.ones(1)  # of Σ sign·|d|, on a grid of steps of one from −Σ|d| to Σ|d|
    for size in range(1, int(np.abs(d).max(initial=0)) + 1):
        count = int((np.abs(d) == size).sum())
        if count:
            steps = np.zeros(2 * size * count + 1)
            steps[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
            law = np.convolve(law, steps)
    reach = len(law) // 2
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, law[np.abs(sums) >= abs(int(d.sum()))].sum()))


def baseline_tests(dataset: Dataset) -> list[ItemTest]:
    """Every optimizer against the baseline on every task, corrected as one table."""
    base = dataset.baseline
    pairs = [(base, name) for name in dataset.optimizers if name != base]
    return _corrected(_with_seeds(list(_tests(dataset, pairs)), dataset))


def disagreements(dataset: Dataset) -> list[ItemTest]:
    """Every pair and task where the lower loss has the lower accuracy, the first by loss first; corrected as one table."""
    tests = [one for one in _tests(dataset, combinations(dataset.optimizers, 2)) if one.disagrees]
    tests = [one if one.losses[0] < one.losses[1] else _turned(one) for one in tests]
    return _corrected(tests)


def _corrected(tests: list[ItemTest]) -> list[ItemTest]:
    return [replace(one, adjusted=p) for one, p in zip(tests, holm([one.p for one in tests])) if p is not None]


def _turned(one: ItemTest) -> ItemTest:
    return replace(
        one,
        first=one.second,
        second=one.first,
        accuracies=one.accuracies[::-1],
        losses=one.losses[::-1],
        gained=one.lost,
        lost=one.gained,
    )


def _tests(dataset: Dataset, pairs: Iterable[tuple[str, str]]) -> Iterable[ItemTest]:
    best, pairs = dataset.best(), list(pairs)
    by_id = {record.id: record.results for record in dataset.records}
    for regime in dataset.regimes:
        for a, b in pairs:
            one, other = best.get((a, regime)), best.get((b, regime))
            if one is None or other is None:
                continue
            mine, others = (_runs(cell, by_id) for cell in (one, other))
            shared = sorted(set(mine) & set(others)) or []
            for task in dict.fromkeys(task for seed in shared for task in mine[seed]):
                both = [(mine[s].get(task), others[s].get(task)) for s in shared]
                same = [(x.right, y.right) for x, y in both if x and y and x.digest == y.digest]
                if not same or len(same) < len(both):
                    continue
                x, y = (np.array(side) for side in zip(*same))
                yield ItemTest(
                    regime,
                    task,
                    a,
                    b,
                    (float(x.mean()), float(y.mean())),
                    (one.loss, other.loss),
                    x.shape[1],
                    len(same),
                    int((y & ~x).sum()),
                    int((x & ~y).sum()),
                    sign_flip(x, y),
                )


def _runs(cell: Best, by_id: dict[str, dict[str, Any]]) -> dict[int, dict[str, downstream.Items]]:
    return {seed: downstream.items(by_id[run]) for seed, run in zip(cell.seeds, cell.ids)}


def _with_seeds(tests: list[ItemTest], dataset: Dataset) -> list[ItemTest]:
    """The same with p over seeds: accuracies in the place of losses, by the code that compares losses."""
    by_id = {record.id: record.results for record in dataset.records}
    p: dict[tuple[str, Regime, str], float | None] = {}
    for task in dict.fromkeys(one.task for one in tests):
        cells = {}
        for key, cell in dataset.best().items():
            rows = [downstream.items(by_id[run]).get(task) for run in cell.ids]
            if all(row is not None for row in rows):
                wrong = tuple(1 - float(np.mean(row.right)) for row in rows if row)
                cells[key] = Seeded(wrong, cell.seeds, cell.ids, cell.chosen)
        tested = compare_all(cells, dataset.baseline, dataset.optimizers, dataset.regimes, dataset.looks)
        p |= {(one.optimizer, one.regime, task): one.p for one in tested}
    over = holm([p.get((one.second, one.regime, one.task)) for one in tests])
    return [replace(one, p_seeds=value) for one, value in zip(tests, over)]
