"""Token speedups by data-equivalence, cell by cell, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.fits.ensemble import Ensemble, fit_ensemble
from megatron_opt.study.fits.hierarchy import Noise
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.power_law import PowerLaw, fit_power_law


@dataclass(frozen=True)
class Speedup:
    """Tokens the baseline needs for the same loss, over the tokens spent."""

    optimizer: str
    n: float
    d: float
    value: float
    low: float
    high: float
    """90% interval"""
    method: str
    """`size`: the baseline's own L(D) at this size; `joint`: the hierarchical law, where a size has under three budgets"""
    beyond: bool = False
    """the baseline would need more tokens than it was ever given at this size: L(D) is extrapolated there"""


def speedups(
    data: Observations, sigma: float, resamples: int = 200, seed: int = 0, ensemble: Ensemble | None = None
) -> list[Speedup]:
    """Speedup of every other optimizer in every cell; `sigma` is the noise of one loss.

    The baseline's L(D) has three parameters: its residuals, where larger than σ, are its noise. A cell beyond the
    baseline's budgets has the interval that spans this law's and the hierarchical law's, so that it carries the error of
    extrapolating; without an `ensemble` one is fitted where it is needed and the data suffice.
    """
    rng, baseline = np.random.default_rng(seed), data.where(data.index == 0)
    by_cell: list[Speedup] = []
    left = []
    for size in data.sizes:
        base = baseline.where(baseline.n == size)
        if len(np.unique(base.d)) < 3:
            left.append(size)
            continue
        others = data.where((data.n == size) & (data.index > 0))
        law = fit_power_law(base.d, base.loss)
        value = law.speedup(others.loss, others.d)
        spread = max(sigma, _misfit(law))
        copies = np.stack(
            [
                fit_power_law(base.d, base.loss + spread * rng.standard_normal(len(base))).speedup(
                    others.loss + sigma * rng.standard_normal(len(others)), others.d
                )
                for _ in range(resamples)
            ]
        )
        low, high = interval(copies)
        most = float(base.d.max()) * (1 + 1e-6)
        for i in range(len(others)):
            ends = float(value[i]), float(low[i]), float(high[i])
            beyond = ends[0] * others.d[i] > most
            by_cell.append(Speedup(data.optimizers[others.index[i]], size, others.d[i], *ends, "size", bool(beyond)))
    if not left and not any(one.beyond for one in by_cell):
        return by_cell
    try:
        ensemble = ensemble or fit_ensemble(data, Noise(sigma), seed=seed)
    except UserError:
        return by_cell
    return [_spanned(one, ensemble) if one.beyond else one for one in by_cell] + _joint(data, left, ensemble)


def _misfit(law: PowerLaw) -> float:
    """Standard error of a loss by the residuals of L(D); 0 where three points leave none."""
    freedom = len(law.residuals) - 3
    return float(np.sqrt(np.sum(law.residuals**2) / freedom)) if freedom > 0 else 0.0


def _spanned(one: Speedup, ensemble: Ensemble) -> Speedup:
    low, high = interval(ensemble.speedups(one.optimizer, one.n, one.d))
    ends = min(one.low, float(low)), max(one.high, float(high))
    return Speedup(one.optimizer, one.n, one.d, one.value, *ends, one.method, True)


def _joint(data: Observations, sizes: list[float], ensemble: Ensemble) -> list[Speedup]:
    joint = []
    cells = data.where(np.isin(data.n, sizes) & (data.index > 0))
    for k, n, d in zip(cells.index, cells.n, cells.d):
        name, copies = data.optimizers[k], ensemble.speedups(data.optimizers[k], n, d)
        low, high = interval(copies)
        base = data.d[(data.index == 0) & (data.n == n)]
        value = float(np.quantile(copies, 0.5, method="inverted_cdf"))
        beyond = not len(base) or value * d > base.max() * (1 + 1e-6)
        joint.append(Speedup(name, n, d, value, float(low), float(high), "joint", bool(beyond)))
    return joint
