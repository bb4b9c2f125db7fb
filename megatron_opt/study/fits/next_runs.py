"""Which further run would narrow the predicted gain most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.study.fits.ensemble import Ensemble


@dataclass(frozen=True)
class NextRun:
    """A run that was not made, and how much it would narrow the interval of a target gain."""

    optimizer: str
    n: float
    ratio: float
    flops: float
    shrinkage: float
    """share of the interval's width that the run would take away"""


def next_runs(
    ensemble: Ensemble, optimizer: str, n: float, d: float, *, tokens_per_parameter: float = 20.0, reach: float = 4.0
) -> list[NextRun]:
    """Candidate runs by what they tell of the gain at (n, d), most first (`Ensemble.narrowing`).

    Candidates: baseline and optimizer at the measured sizes and up to `reach` times beyond, at the measured ratios and
    twice the largest.
    """
    data = ensemble.data
    sizes = np.unique(np.concatenate([data.sizes, data.sizes[-1] * np.array([2.0, reach])]))
    # two digits: sizes and budgets are whole numbers, so equal ratios differ a little
    ratios = np.unique([float(f"{ratio:.2g}") for ratio in data.d / data.n / tokens_per_parameter])
    runs = [
        (name, float(size), float(ratio))
        for name in (ensemble.optimizers[0], optimizer)
        for size in sizes
        for ratio in np.append(ratios, 2 * ratios[-1])
    ]
    points = [(name, size, ratio * tokens_per_parameter * size) for name, size, ratio in runs]
    shrinkage = ensemble.narrowing(optimizer, (n, d), points)
    found = [
        NextRun(name, size, ratio, 6 * size * tokens, float(share))
        for (name, size, ratio), (_, _, tokens), share in zip(runs, points, shrinkage)
    ]
    return sorted(found, key=lambda run: -run.shrinkage)
