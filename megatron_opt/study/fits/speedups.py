"""Token speedups by data-equivalence, cell by cell, with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.power_law import fit_power_law
from megatron_opt.study.fits.scaling import fit_law


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
    """`size`: the baseline's own L(D) at this size; `joint`: the shared law, where a size has under
    three budgets
    """


def speedups(data: Observations, sigma: float, resamples: int = 200, seed: int = 0) -> list[Speedup]:
    """Speedup of every other optimizer in every cell; `sigma` is the noise of one loss."""
    rng, baseline = np.random.default_rng(seed), data.where(data.index == 0)
    found: list[Speedup] = []
    left = []
    for size in data.sizes:
        base = baseline.where(baseline.n == size)
        if len(np.unique(base.d)) < 3:
            left.append(size)
            continue
        others = data.where((data.n == size) & (data.index > 0))
        value = fit_power_law(base.d, base.loss).speedup(others.loss, others.d)
        copies = np.stack(
            [
                fit_power_law(base.d, base.loss + sigma * rng.standard_normal(len(base))).speedup(
                    others.loss + sigma * rng.standard_normal(len(others)), others.d
                )
                for _ in range(resamples)
            ]
        )
        low, high = interval(copies)
        found += [
            Speedup(
                data.optimizers[others.index[i]],
                size,
                others.d[i],
                float(value[i]),
                float(low[i]),
                float(high[i]),
                "size",
            )
            for i in range(len(others))
        ]
    return found + _joint(data, left, sigma, resamples, seed)


def _joint(data: Observations, sizes: list[float], sigma: float, resamples: int, seed: int) -> list[Speedup]:
    if not sizes:
        return []
    try:
        fit = fit_law(data, "shared", noise=sigma, resamples=resamples, seed=seed)
    except UserError:
        return []
    found = []
    cells = data.where(np.isin(data.n, sizes) & (data.index > 0))
    for k, n, d in zip(cells.index, cells.n, cells.d):
        name = data.optimizers[k]
        copies = [float(fit.speedup(name, n, d, theta)) for theta in fit.draws]
        low, high = interval(np.array(copies))
        found.append(Speedup(name, n, d, float(fit.speedup(name, n, d)), float(low), float(high), "joint"))
    return found
