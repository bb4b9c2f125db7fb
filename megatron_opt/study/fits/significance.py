"""Whether one optimizer beats another: tests by shared seeds, with a noise that the table itself has measured.

Two runs with one seed see the same data in the same order, so that much of a seed's luck cancels in their difference. In
each regime loss = optimizer + seed + own noise; what is left after both effects, pooled over the table, is the own noise
σ with its degrees of freedom, and a gain over n shared seeds has the standard error σ·√(2/n). No p-value is made from an
assumed noise: where nothing was repeated, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from megatron_opt.study.dataset import Seeded
from megatron_opt.study.spec import Regime

LEVEL = 0.95
"""of intervals and, as 1 − LEVEL, of p-values"""
POWER = 0.8
MOST_SEEDS = 1000
LEAST_SIGMA = 1e-9
"""losses that agree to the last digit are no proof of no noise"""

Cells = Mapping[tuple[str, Regime], Seeded]


@dataclass(frozen=True)
class SeedNoise:
    """A standard deviation of one final loss and the degrees of freedom behind it; 0: not measured."""

    sigma: float
    freedom: int


@dataclass(frozen=True)
class Comparison:
    """An optimizer against the baseline in one regime."""

    optimizer: str
    regime: Regime
    gain: float
    """mean loss of the baseline − mean loss of the optimizer, over shared seeds where there are any"""
    seeds: tuple[int, ...] = ()
    """the seeds behind the gain; of both where they are not shared"""
    paired: bool = False
    low: float | None = None
    high: float | None = None
    """interval of the gain at LEVEL (for every look, if there are several); None: cannot be said"""
    p: float | None = None
    """two-sided p-value of no difference, times the looks"""
    adjusted: float | None = None
    """p after Holm's correction over the table"""
    seeds_needed: int | None = None
    """shared seeds for 80% power at the level that Holm's correction asks for, if the gain is real"""
    why: str = ""
    """why nothing can be said"""
    runs: tuple[str, ...] = ()
    margin: float = 0.0
    """differences within it do not matter"""
    baseline: str = ""

    @property
    def significant(self) -> bool:
        return self.adjusted is not None and self.adjusted < 1 - LEVEL

    @property
    def settled(self) -> bool:
        """No further seed is needed: a difference is shown, or none that matters is left."""
        return self.verdict in ("better", "worse", "alike")

    @property
    def verdict(self) -> str:
        """better, worse, alike (all of the interval within the margin), not settled, or cannot be said."""
        if self.p is None or self.low is None or self.high is None:
            return "cannot be said"
        if self.significant:
            return "better" if self.gain > 0 else "worse"
        return "alike" if -self.margin < self.low and self.high < self.margin else "not settled"


def own_noise(cells: Cells) -> SeedNoise:
    """Pooled over regimes: residuals of loss = optimizer + seed, by least squares, so that seeds may be missing."""
    squares, freedom = 0.0, 0
    for rows in _by_regime(cells).values():
        names, seeds = sorted({name for name, *_ in rows}), sorted({seed for _, seed, _ in rows})
        if len(names) < 2 or len(rows) <= len(names) + len(seeds) - 1:
            continue
        design = np.array([[name == n for n in names] + [seed == s for s in seeds] for name, seed, _ in rows], float)
        loss = np.array([value for *_, value in rows])
        # Losses of one regime are close together: centered, their differences keep all digits.
        loss = loss - loss.mean()
        solution, _, rank, _ = np.linalg.lstsq(design, loss, rcond=None)
        squares += float(np.sum((loss - design @ solution) ** 2))
        freedom += len(rows) - int(rank)
    return _pooled(squares, freedom)


def total_noise(cells: Cells) -> SeedNoise:
    """Pooled over cells: spread of a configuration's loss over its seeds, what they share included."""
    squares = sum(float(np.var(cell.losses)) * len(cell.losses) for cell in cells.values())
    return _pooled(squares, sum(len(cell.losses) - 1 for cell in cells.values()))


def _pooled(squares: float, freedom: int) -> SeedNoise:
    return SeedNoise(max(math.sqrt(squares / freedom), LEAST_SIGMA), freedom) if freedom else SeedNoise(math.nan, 0)


def _by_regime(cells: Cells) -> dict[Regime, list[tuple[str, int, float]]]:
    rows: dict[Regime, list[tuple[str, int, float]]] = {}
    for (name, regime), cell in cells.items():
        if not cell.chosen:
            rows.setdefault(regime, []).extend((name, seed, loss) for seed, loss in zip(cell.seeds, cell.losses))
    return rows


def compare_all(
    cells: Cells,
    baseline: str,
    optimizers: Iterable[str],
    regimes: Iterable[Regime],
    looks: int = 1,
    margin: float = 0.0,
    plan: bool = False,
) -> list[Comparison]:
    """Every optimizer against the baseline in every regime where both have a result, corrected as one table.

    `looks`: how often the table may be looked at before it is final; each look has its share of the level. `plan` adds the
    seeds that each comparison would need.
    """
    names = list(optimizers)
    pairs = [(name, baseline, regime) for regime in regimes for name in names if name != baseline]
    return compare_pairs(cells, pairs, looks, margin, plan)


def compare_pairs(
    cells: Cells,
    pairs: Iterable[tuple[str, str, Regime]],
    looks: int = 1,
    margin: float = 0.0,
    plan: bool = False,
) -> list[Comparison]:
    """The same for each (optimizer, its baseline, regime) of which both have a result: one table, one noise, one correction."""
    listed = [(a, b, regime) for a, b, regime in pairs if (a, regime) in cells and (b, regime) in cells]
    own, total = own_noise(cells), total_noise(cells)
    compared = [(base, _compare(cells, name, base, regime, margin)) for name, base, regime in listed]
    comparisons = [_test(one, cells, base, own if one.paired else total, looks) for base, one in compared]
    comparisons = [replace(one, adjusted=p) for one, p in zip(comparisons, holm([one.p for one in comparisons]))]
    return _needs(comparisons, own, looks) if plan else comparisons


def _compare(cells: Cells, name: str, baseline: str, regime: Regime, margin: float) -> Comparison:
    mine, base = cells[name, regime], cells[baseline, regime]
    shared = tuple(sorted(set(mine.seeds) & set(base.seeds)))
    if shared and not (mine.chosen or base.chosen):
        a, b = mine.by_seed, base.by_seed
        gain = float(np.mean([b[seed] - a[seed] for seed in shared]))
        runs = tuple(run for cell in (mine, base) for run, seed in zip(cell.ids, cell.seeds) if seed in shared)
        return Comparison(name, regime, gain, shared, True, runs=runs, margin=margin, baseline=baseline)
    seeds = tuple(sorted({*mine.seeds, *base.seeds}))
    runs = (*mine.ids, *base.ids)
    return Comparison(name, regime, base.loss - mine.loss, seeds, runs=runs, margin=margin, baseline=baseline)


def _test(one: Comparison, cells: Cells, baseline: str, noise: SeedNoise, looks: int) -> Comparison:
    mine, base = cells[one.optimizer, one.regime], cells[baseline, one.regime]
    if mine.chosen or base.chosen:
        return replace(one, why="no seed beside the one on which the configuration was chosen")
    counts = (len(one.seeds),) * 2 if one.paired else (len(mine.losses), len(base.losses))
    if min(counts) < 2:
        return replace(one, why="one seed")
    if not noise.freedom:
        return replace(one, why="no repeated seeds from which to measure the noise")
    error = noise.sigma * math.sqrt(1 / counts[0] + 1 / counts[1])
    law = stats.t(noise.freedom)
    reach = float(law.isf((1 - LEVEL) / 2 / looks)) * error
    p = min(1.0, 2 * float(law.sf(abs(one.gain) / error)) * looks)
    return replace(one, low=one.gain - reach, high=one.gain + reach, p=p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over all p-values that there are."""
    known = sorted((p, i) for i, p in enumerate(values) if p is not None)
    so_far, corrected = 0.0, list(values)
    for position, (p, i) in enumerate(known):
        so_far = max(so_far, min(1.0, (len(known) - position) * p))
        corrected[i] = so_far
    return corrected


def _needs(comparisons: list[Comparison], own: SeedNoise, looks: int) -> list[Comparison]:
    left = max(1, sum(one.p is not None and not one.significant for one in comparisons))
    alpha = (1 - LEVEL) / looks / left
    return [
        replace(one, seeds_needed=seeds_for(one.gain, own, alpha)) if one.p is not None and one.paired else one
        for one in comparisons
    ]


def seeds_for(gain: float, own: SeedNoise, alpha: float = 1 - LEVEL) -> int | None:
    """Fewest shared seeds (at least two) with 80% power for a gain; None without a measured noise or beyond 1000."""
    if not own.freedom or not gain:
        return None
    low, high = 1, MOST_SEEDS + 1
    while high - low > 1:
        middle = (low + high) // 2
        if power(abs(gain), own, middle, alpha) >= POWER:
            high = middle
        else:
            low = middle
    return None if high > MOST_SEEDS else high


def power(gain: float, own: SeedNoise, seeds: int, alpha: float = 1 - LEVEL) -> float:
    """Chance that a real gain over so many shared seeds is found, by the noncentral t distribution."""
    freedom = max(own.freedom, seeds - 1)
    shift = gain / (own.sigma * math.sqrt(2 / seeds))
    if shift > 30:  # beyond what the distribution is computed for, and certain
        return 1.0
    return float(stats.nct.sf(stats.t.isf(alpha / 2, freedom), freedom, shift))
