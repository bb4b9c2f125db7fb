"""Whether the findings of a comparison of AdamW, Lion and Sophia at one budget (arXiv 2507.08472) hold in a study.

Families of models are told apart by what stands before the first hyphen of their names (`gpt-2.7b`, `llama-2.7b`); each is judged
at its largest model, at the smallest budget that was read once. Where an interval holds both answers, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from megatron_opt.study import downstream
from megatron_opt.study.dataset import Best, Dataset, Seeded
from megatron_opt.study.fits import intervals
from megatron_opt.study.fits.noise import noise_floor
from megatron_opt.study.fits.optima import optima
from megatron_opt.study.fits.significance import LEVEL, Cells, Comparison, compare_pairs
from megatron_opt.study.fits.wall_clock import step_ratios
from megatron_opt.study.spec import Regime

HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "not settled", "not run"


@dataclass(frozen=True)
class Finding:
    """One claim in one family, with the numbers behind it and what they say."""

    claim: str
    family: str
    evidence: tuple[str, ...]
    verdict: str
    regime: str = ""
    """where it is judged"""


def findings(dataset: Dataset) -> list[Finding]:
    """The five claims, family by family."""
    families: dict[str, list[Regime]] = {}
    for regime in dataset.sizes:
        families.setdefault(regime.model.split("-")[0], []).append(regime)
    judged_all = []
    for family, regimes in families.items():
        once = [regime for regime in regimes if regime.epochs == 1 and regime.model == regimes[-1].model]
        target = min(once, key=lambda regime: regime.ratio, default=regimes[-1])
        judged = [one(dataset, family, target) for one in (_fastest, _lowest, _downstream)]
        judged_all += [replace(one, regime=str(target)) for one in judged] + _epochs(dataset, family, regimes)
    return judged_all + _rates(dataset, families)


def _fastest(dataset: Dataset, family: str, target: Regime) -> Finding:
    """Lion's steps are the shortest."""
    claim = "Lion is the fastest"
    ratios = step_ratios(replace(dataset, baseline="lion", _best=None))
    mine = {name: one for (name, regime), one in ratios.items() if regime == target}
    all_there = len(mine) == len(dataset.optimizers) - 1
    shown = {name: f"{one.value:.3f}" if math.isnan(one.low) else one.text(3) for name, one in mine.items()}
    said = tuple(f"a step of {name} takes {text} times Lion's" for name, text in shown.items())
    if not mine:
        return Finding(claim, family, (), MISSING)
    if any(math.isnan(one.low) for one in mine.values()):
        return Finding(claim, family, said, OPEN)
    if all_there and all(one.low > 1 for one in mine.values()):
        return Finding(claim, family, said, HOLDS)
    fails = any(one.high < 1 for one in mine.values())
    return Finding(claim, family, said, FAILS if fails else OPEN if all_there else MISSING)


def _lowest(dataset: Dataset, family: str, target: Regime) -> Finding:
    cells = {key: cell for key, cell in dataset.best().items() if key[1].epochs == 1}
    tested = _against(dataset, cells, "sophia", target)
    return _judged(dataset, "Sophia has the lowest loss", family, tested, "Sophia's loss lies {} below {}'s")


def _downstream(dataset: Dataset, family: str, target: Regime) -> Finding:
    """By the mean accuracy over tasks, with the noise that it has over seeds."""
    by_id = {record.id: record.results for record in dataset.records}
    cells: dict[tuple[str, Regime], Seeded] = {}
    for key, cell in dataset.best().items():
        rows = [downstream.items(by_id[run]) for run in cell.ids]
        if all(rows):
            wrong = tuple(1 - float(np.mean([np.mean(one.right) for one in row.values()])) for row in rows)
            cells[key] = Seeded(wrong, cell.seeds, cell.ids, cell.chosen)
    tested = _against(dataset, cells, "adamw", target)
    return _judged(dataset, "AdamW is the best downstream", family, tested, "AdamW's accuracy lies {} above {}'s")


def _epochs(dataset: Dataset, family: str, regimes: list[Regime]) -> list[Finding]:
    """Further epochs of the same tokens lower the loss, and AdamW's most."""
    best, verdicts = dataset.best(), []
    for regime in (regime for regime in regimes if regime.epochs > 1):
        once = Regime(regime.model, regime.ratio / regime.epochs)
        table: dict[tuple[str, Regime], Seeded] = {}
        gains: dict[tuple[str, Regime], Seeded] = {}
        for name in dataset.optimizers:
            again, first = best.get((name, regime)), best.get((name, once))
            if again is None or first is None:
                continue
            table[name, regime], table[f"{name} once", regime] = again, first
            if (difference := _difference(again, first)) is not None:
                gains[name, regime] = difference
        names = [name for name in dataset.optimizers if (name, regime) in table]
        tested = compare_pairs(table, [(name, f"{name} once", regime) for name in names])
        said = f"{regime.epochs} epochs lower the loss by {{}} ({{}}, {regime})"
        verdicts.append(_judged(dataset, "Epochs help", family, tested, said, self_named=True))
        most = _against(dataset, gains, "adamw", regime)
        said = f"{regime.epochs} epochs lower AdamW's loss by {{}} more than {{}}'s ({regime})"
        verdicts.append(_judged(dataset, "Epochs help AdamW most", family, most, said))
    return verdicts or [Finding("Epochs help", family, (), MISSING)]


def _difference(again: Best, first: Best) -> Seeded | None:
    """Loss of the repeated run minus that of one epoch, seed by seed."""
    shared = sorted(set(again.seeds) & set(first.seeds))
    if not shared or again.chosen or first.chosen:
        return None
    a, b = again.by_seed, first.by_seed
    ids = dict(zip(again.seeds, again.ids))
    return Seeded(tuple(a[s] - b[s] for s in shared), tuple(shared), tuple(ids[s] for s in shared))


def _against(dataset: Dataset, cells: Cells, name: str, regime: Regime) -> list[Comparison]:
    others = [other for other in dataset.optimizers if other != name]
    return compare_pairs(cells, [(name, other, regime) for other in others], dataset.looks, dataset.margin)


def _judged(
    dataset: Dataset, claim: str, family: str, tested: Iterable[Comparison], said: str, self_named: bool = False
) -> Finding:
    """Holds where all are better, does not where one is worse, after Holm's correction over the claim.

    `self_named`: each optimizer against itself, not one against all others.
    """
    rows, words = list(tested), []
    for one in rows:
        other = one.optimizer if self_named else one.baseline
        reach = "" if one.low is None else f" ({one.low:+.4f} to {one.high:+.4f}, {LEVEL:.0%})"
        words.append(said.format(f"{one.gain:+.4f}{reach}", other))
    if not rows:
        return Finding(claim, family, (), MISSING)
    verdicts = {one.verdict for one in rows}
    lacking = len(rows) < len(dataset.optimizers) - (not self_named)
    verdict = FAILS if "worse" in verdicts else MISSING if lacking else HOLDS if verdicts == {"better"} else OPEN
    return Finding(claim, family, tuple(words), verdict)


def _rates(dataset: Dataset, families: dict[str, list[Regime]]) -> list[Finding]:
    """LLaMA's tuned rate is twice GPT's: at the smallest models, optimizer by optimizer, 90% from the curves of losses."""
    claim, z = "LLaMA's rate is twice GPT's", float(stats.norm.isf((1 - intervals.LEVEL) / 2))
    if not {"gpt", "llama"} <= families.keys():
        return []
    sizes = {regime: float(n) for regime, n in dataset.sizes.items()}
    sigma, verdicts = noise_floor(dataset).sigma, []
    for name in dataset.optimizers:
        known = {one.n: one for one in optima(dataset, name, "lr", sigma)}
        ends = [known.get(sizes[families[family][0]]) for family in ("gpt", "llama")]
        if ends[0] is None or ends[1] is None:
            verdicts.append(Finding(claim, name, (), MISSING))
            continue
        middle, reach = ends[1].log_value - ends[0].log_value, z * math.hypot(ends[0].error, ends[1].error)
        low, value, high = (math.exp(x) for x in (middle - reach, middle, middle + reach))
        said = (f"LLaMA's best rate of {name} is {value:.2f} times GPT's ({low:.2f} to {high:.2f}, 90%)",)
        verdict = FAILS if not low <= 2 <= high else HOLDS if low > 1 else OPEN
        verdicts.append(Finding(claim, name, said, verdict))
    return verdicts
