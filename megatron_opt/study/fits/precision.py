"""What FP8 does to each optimizer: the loss it costs, whether a gain over the baseline survives, whether the best rate moves.

A precision is a model whose FP8 flags alone differ from those of another in bf16 (or fp32). Runs are paired by (optimizer, seed), each
at the rate that was tuned in its own precision. Where an interval holds both answers, nothing is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from megatron_opt.study.dataset import Best, Dataset, Seeded
from megatron_opt.study.fits import intervals
from megatron_opt.study.fits.findings import FAILS, HOLDS, MISSING, OPEN, Finding
from megatron_opt.study.fits.noise import noise_floor
from megatron_opt.study.fits.optima import Optimum, optima
from megatron_opt.study.fits.significance import LEVEL, Comparison, SeedNoise, compare_pairs, holm, own_noise
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record

SHAPE = (
    "preset", "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-experts", "seq-length", "transformer-impl",
)  # fmt: skip
"""flags in which two precisions of one model agree"""
MOST_SHIFT = 2.0
"""a best rate within this factor stays"""


Key = tuple[str, Regime]
"""optimizer and regime"""


@dataclass(frozen=True)
class Pair:
    """One recipe of FP8 and the same model without FP8."""

    recipe: str
    regime: Regime
    plain: Regime


@dataclass(frozen=True)
class Shift:
    """How far the best rate of an optimizer lies from that without FP8, as a factor at 90%."""

    value: float
    low: float
    high: float
    edge: bool
    """one of the two optima is the last rate that was tried"""
    doubt: str = ""
    """why nothing is said of it"""


def precision_of(record: Record) -> str:
    """The recipe of FP8, else bf16 or fp32."""
    flags = record.config.get("flags", {})
    if flags.get("fp8-format"):
        return str(flags.get("fp8-recipe") or "delayed")
    return "bf16" if flags.get("bf16") else "fp32"


def pairs(dataset: Dataset) -> list[Pair]:
    """Every regime in FP8 beside the one that differs from it in nothing else; none where the study has no FP8."""
    of: dict[Regime, tuple[str, tuple[Any, ...]]] = {}
    for record in dataset.records:
        of.setdefault(record.regime, (precision_of(record), _shape(record)))
    plain = {shape: regime for regime, (name, shape) in of.items() if name in ("bf16", "fp32")}
    return [
        Pair(name, regime, plain[shape])
        for regime, (name, shape) in of.items()
        if name not in ("bf16", "fp32") and shape in plain
    ]


def _shape(record: Record) -> tuple[Any, ...]:
    """The model and its tokens without what makes a precision; optimizers, seeds and hyperparameters left out."""
    flags = record.config.get("flags", {})
    return (*(str(flags.get(name)) for name in SHAPE), record.regime.ratio, record.regime.epochs)


def _cells(dataset: Dataset) -> dict[tuple[str, Regime], Seeded]:
    """All results of a model in the regime without FP8, those in a recipe under `optimizer recipe`: one table with one noise."""
    best, cells = dataset.best(), dict[tuple[str, Regime], Seeded]()
    for pair in pairs(dataset):
        for name in dataset.optimizers:
            for key, regime in ((name, pair.plain), (f"{name} {pair.recipe}", pair.regime)):
                if (name, regime) in best:
                    cells[key, pair.plain] = best[name, regime]
    return cells


def costs(dataset: Dataset) -> dict[Key, Comparison]:
    """For each optimizer and recipe the loss without FP8 less that in FP8: negative where FP8 costs."""
    at = {(f"{name} {pair.recipe}", pair.plain): (name, pair) for name in dataset.optimizers for pair in pairs(dataset)}
    listed = [(label, name, pair.plain) for (label, _), (name, pair) in at.items()]
    found = compare_pairs(_cells(dataset), listed, dataset.looks, dataset.margin)
    named = ((at[one.optimizer, one.regime], one) for one in found)
    return {(name, pair.regime): replace(one, optimizer=name, regime=pair.regime) for (name, pair), one in named}


def gains(dataset: Dataset) -> dict[Key, Comparison]:
    """Each optimizer against the baseline within each precision."""
    regimes = list(dict.fromkeys(one for pair in pairs(dataset) for one in (pair.plain, pair.regime)))
    listed = [(n, dataset.baseline, regime) for regime in regimes for n in dataset.optimizers if n != dataset.baseline]
    found = compare_pairs(dataset.best(), listed, dataset.looks, dataset.margin)
    return {(one.optimizer, one.regime): one for one in found}


def changes(dataset: Dataset) -> dict[Key, Comparison]:
    """The gain over the baseline in FP8 less that without FP8, seed by seed; four losses make it, so its error is σ·√(4/n)."""
    best, noise, found = dataset.best(), own_noise(_cells(dataset)), dict[Key, Comparison]()
    for pair in pairs(dataset):
        corners = [(dataset.baseline, pair.regime), (dataset.baseline, pair.plain)]
        for name in (one for one in dataset.optimizers if one != dataset.baseline):
            cells = [best.get(key) for key in (*corners, (name, pair.plain), (name, pair.regime))]
            base = Comparison(name, pair.regime, math.nan, margin=dataset.margin, baseline=dataset.baseline)
            if (one := _change(base, [cell for cell in cells if cell is not None], noise)) is not None:
                found[name, pair.regime] = one
    corrected = holm([one.p for one in found.values()])
    return {key: replace(one, adjusted=p) for (key, one), p in zip(found.items(), corrected)}


def _change(base: Comparison, cells: list[Best], noise: SeedNoise) -> Comparison | None:
    """(baseline in FP8 − without) + (optimizer without − in FP8) of these four cells, with its interval."""
    if len(cells) < 4:
        return None
    shared = sorted(set.intersection(*(set(cell.seeds) for cell in cells)))
    seen = [[cell.by_seed[seed] for cell in cells] for seed in shared] or [[cell.loss for cell in cells]]
    gain = sum(a - b + c - d for a, b, c, d in seen) / len(seen)
    one = replace(base, gain=gain, seeds=tuple(shared), paired=bool(shared))
    if any(cell.chosen for cell in cells) or len(shared) < 2 or not noise.freedom:
        return replace(
            one,
            why="fewer than two shared seeds" if noise.freedom else "no repeated seeds from which to measure the noise",
        )
    error, law = noise.sigma * math.sqrt(4 / len(shared)), stats.t(noise.freedom)
    reach = float(law.isf((1 - LEVEL) / 2)) * error
    p = 2 * float(law.sf(abs(one.gain) / error))
    return replace(one, low=one.gain - reach, high=one.gain + reach, p=p)


def best_rates(dataset: Dataset) -> dict[Key, Optimum]:
    """The vertex of the losses over the rate, of each optimizer in each precision; its losses share a seed, and with it its luck."""
    sigma, found = _noise(dataset).sigma, {}
    for regime in dict.fromkeys(one for pair in pairs(dataset) for one in (pair.plain, pair.regime)):
        alone = replace(dataset, records=[one for one in dataset.records if one.regime == regime], _best=None)
        for name in alone.optimizers:
            if one := optima(alone, name, "lr", sigma):
                found[name, regime] = one[0]
    return found


def _noise(dataset: Dataset) -> SeedNoise:
    """Of one loss beside what its seed shares with others; of all of it where nothing more is known; no freedom: assumed."""
    own, every = own_noise(_cells(dataset)), noise_floor(dataset)
    return own if own.freedom else SeedNoise(every.sigma, every.freedom)


def _doubt(rates: Iterable[Optimum], noise: SeedNoise) -> str:
    if any(one.edge for one in rates):
        return "an optimum is the last rate that was tried"
    if not noise.freedom:
        return "the noise is assumed"
    rises = [one.curvature / 2 * math.log(MOST_SHIFT) ** 2 for one in rates if one.curvature is not None]
    return "twice the rate costs less than the noise shows" if min(rises, default=math.inf) < 2 * noise.sigma else ""


def shifts(dataset: Dataset) -> dict[Key, Shift]:
    """The best rate in each recipe over that without FP8."""
    rates, z = best_rates(dataset), float(stats.norm.isf((1 - intervals.LEVEL) / 2))
    sigma, found = _noise(dataset), {}
    for pair in pairs(dataset):
        for name in dataset.optimizers:
            ours, plain = rates.get((name, pair.regime)), rates.get((name, pair.plain))
            if ours is None or plain is None:
                continue
            middle, reach = ours.log_value - plain.log_value, z * math.hypot(ours.error, plain.error)
            values = [math.exp(x) for x in (middle, middle - reach, middle + reach)]
            found[name, pair.regime] = Shift(
                values[0], values[1], values[2], ours.edge or plain.edge, _doubt((ours, plain), sigma)
            )
    return found


FREE, SURVIVES, STAYS = "Does FP8 cost loss?", "Does a gain survive FP8?", "Does the best rate stay?"
CLAIMS = {FREE: "FP8 costs no loss", SURVIVES: "The gain survives", STAYS: "The best rate stays"}
NO_GAIN = "no gain is shown that could survive"


def precision_findings(dataset: Dataset) -> dict[str, list[Finding]]:
    """Question → claims of every optimizer in every recipe: FP8 costs it nothing, its gain survives, its best rate stays."""
    lost, gained, changed, moved = costs(dataset), gains(dataset), changes(dataset), shifts(dataset)
    found: dict[str, list[Finding]] = {FREE: [], SURVIVES: [], STAYS: []}
    for name in dataset.optimizers:
        for pair in pairs(dataset):
            key = (name, pair.regime)
            found[FREE].append(_free(name, pair, lost.get(key)))
            if name != dataset.baseline:
                known = [gained.get((name, pair.plain)), gained.get(key), changed.get(key)]
                found[SURVIVES].append(_survives(name, pair, dataset.baseline, known))
            found[STAYS].append(_stays(name, pair, moved.get(key)))
    return found


def in_short(found: dict[str, list[Finding]], recipes: dict[str, str]) -> list[str]:
    """A sentence for each question: of each optimizer in which recipes its claim holds and in which not; `recipes` by regime."""
    said = []
    for question, judged in found.items():
        parts = []
        for name in dict.fromkeys(one.family for one in judged):
            mine, of = [one for one in judged if one.family == name], dict[str, list[str]]()
            for one in mine:
                verdict = f"{one.verdict}, as {NO_GAIN}" if NO_GAIN in one.evidence else one.verdict
                of.setdefault(verdict, []).append(recipes.get(one.regime, one.regime))
            where = {v: "every recipe" if len(of) == 1 and len(mine) > 1 else ", ".join(r) for v, r in of.items()}
            parts.append(f"{name} ({'; '.join(f'{verdict}: {which}' for verdict, which in where.items())})")
        said.append(f"**{CLAIMS[question]}**: {', '.join(parts)}.")
    return said


def interval_of(one: Comparison | None, sign: float = 1.0) -> str:
    """The gain (or what it costs: sign −1) with its interval."""
    if one is None:
        return "–"
    if one.low is None or one.high is None:
        return f"{sign * one.gain:+.4f} ({one.why})"
    low, high = sorted((sign * one.low, sign * one.high))
    return f"{sign * one.gain:+.4f} ({low:+.4f} to {high:+.4f}, {LEVEL:.0%})"


def _free(name: str, pair: Pair, one: Comparison | None) -> Finding:
    claim = f"{pair.recipe} costs {name} nothing"
    if one is None:
        return Finding(claim, name, (), MISSING, str(pair.regime))
    verdict = {"alike": HOLDS, "better": HOLDS, "worse": FAILS}.get(one.verdict, OPEN)
    return Finding(claim, name, (f"loss {interval_of(one, -1.0)}",), verdict, str(pair.regime))


def _survives(name: str, pair: Pair, baseline: str, known: list[Comparison | None]) -> Finding:
    """Where there is a gain without FP8, one in FP8 too, that is not shown to be smaller."""
    claim = f"{name}'s gain over {baseline} survives {pair.recipe}"
    plain, ours, change = known
    if plain is None or ours is None or change is None:
        return Finding(claim, name, (), MISSING, str(pair.regime))
    said = (
        f"without FP8 {interval_of(plain)}",
        f"in it {interval_of(ours)}",
        f"difference {interval_of(change)}",
    )
    if plain.verdict != "better":
        return Finding(claim, name, (*said, NO_GAIN), OPEN, str(pair.regime))
    if ours.verdict == "worse" or change.verdict == "worse":
        verdict = FAILS
    else:
        verdict = HOLDS if ours.verdict == "better" else OPEN
    return Finding(claim, name, said, verdict, str(pair.regime))


def _stays(name: str, pair: Pair, one: Shift | None) -> Finding:
    claim = f"{name}'s best rate stays in {pair.recipe}"
    if one is None:
        return Finding(claim, name, (), MISSING, str(pair.regime))
    said = (
        f"{one.value:.2f} times ({one.low:.2f} to {one.high:.2f}, {intervals.LEVEL:.0%})",
        *([one.doubt] if one.doubt else []),
    )
    within = 1 / MOST_SHIFT < one.low and one.high < MOST_SHIFT
    verdict = FAILS if not one.low <= 1 <= one.high else HOLDS if within else OPEN
    return Finding(claim, name, said, OPEN if one.doubt else verdict, str(pair.regime))
