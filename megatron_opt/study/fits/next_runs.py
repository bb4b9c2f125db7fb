"""Which further runs would narrow the predicted gain: the expected width of its posterior once they are there.

Under each form of law, made linear at its mode, losses that are there, losses to come and the gain at the target are jointly
Gaussian, noises common to a cell and to an (optimizer, size) included: a second run of a configuration shares the latter with
the first. Over the forms, of weights w_f, the variance of the gain is Σ w_f·(v_f + (m_f − m)²); new losses shrink v_f and tell
the forms apart. Its expectation after them is an average over losses drawn from the forms themselves (preposterior
analysis; Raiffa and Schlaifer, 1961). Backtests' scale and floor are taken as they are now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm, qmc

from megatron_opt.study.fits.ensemble import Copies, Ensemble
from megatron_opt.study.fits.hierarchy import Hierarchy
from megatron_opt.study.fits.intervals import interval

DRAWS = 64
"""imagined outcomes a form"""
BEYOND = (2.0, 4.0, 8.0)
"""sizes that candidates have beyond the largest measured one"""
Point = tuple[str, float, float]
"""optimizer, N, D"""


@dataclass(frozen=True)
class NextRun:
    """Runs that were not made (several: with one new seed), and how much they would narrow the interval of a target gain."""

    optimizers: tuple[str, ...]
    n: float
    ratio: float
    flops: float
    """6·N·D of all of them"""
    shrinkage: float
    """share of the interval's width that they are expected to take away"""
    width: float
    """expected width of the 90% interval after them"""
    hours: float | None = None
    """GPU-hours, where a price of runs is known"""

    @property
    def optimizer(self) -> str:
        """Who is trained, in words."""
        return " and ".join(self.optimizers)

    @property
    def rate(self) -> float:
        """Width taken away an hour."""
        return 0.0 if not self.hours else self.shrinkage * self.width / (1 - self.shrinkage) / self.hours


def next_runs(
    ensemble: Ensemble,
    optimizer: str,
    n: float,
    d: float,
    *,
    tokens_per_parameter: float = 20.0,
    hours: Callable[[str, float, float], float] | None = None,
) -> list[NextRun]:
    """Candidate runs by what they tell of the gain at (n, d), most first; `hours`: GPU-hours of (optimizer, N, D).

    Candidates: baseline and optimizer, alone and together, at the measured sizes and those `BEYOND`, at the measured ratios and
    twice the largest, below the target's own size.
    """
    data = ensemble.data
    sizes = np.unique(np.concatenate([data.sizes, data.sizes[-1] * np.array(BEYOND)]))
    # two digits: sizes and budgets are whole numbers, so equal ratios differ a little
    ratios = np.unique([float(f"{ratio:.2g}") for ratio in data.d / data.n / tokens_per_parameter])
    low, high = interval(ensemble.gains(optimizer, n, d))
    base, candidates = ensemble.optimizers[0], []
    designs = [
        (names, float(size), float(ratio))
        for names in ((base,), (optimizer,), (base, optimizer))
        for size in sizes
        for ratio in np.append(ratios, 2 * ratios[-1])
        if size < n or size <= data.sizes[-1]
    ]
    points = [[(name, size, ratio * tokens_per_parameter * size) for name in names] for names, size, ratio in designs]
    for (names, size, ratio), runs, share in zip(designs, points, narrowing(ensemble, optimizer, (n, d), points)):
        flops = sum(6 * one[1] * one[2] for one in runs)
        spent = None if hours is None else sum(hours(*one) for one in runs)
        candidates.append(NextRun(names, size, ratio, flops, float(share), float((high - low) * (1 - share)), spent))
    return sorted(candidates, key=lambda run: -run.shrinkage)


def narrowing(
    ensemble: Ensemble, optimizer: str, target: tuple[float, float], designs: list[list[Point]]
) -> np.ndarray:
    """Share of the standard deviation of a gain at `target` (N, D) that each set of new runs is expected to take away."""
    runs = list(dict.fromkeys(point for design in designs for point in design))
    index = {point: k for k, point in enumerate(runs)}
    weights = np.array([weight for _, weight in ensemble.members])
    forms = [_joint(fit, optimizer, target, runs) for fit, _ in ensemble.members]
    means = np.stack([_means(copies, ensemble.optimizers[0], optimizer, target, runs) for copies in ensemble.copies])
    before = np.sqrt(_mixed(weights, means[:, 0], np.array([covariance[0, 0] for covariance in forms])))
    shares = []
    for design in designs:
        rows = np.array([index[point] + 1 for point in design])
        after = _expected(weights, means[:, 0], means[:, rows], forms, rows)
        shares.append(1 - np.sqrt(min(1.0, after / before**2)))
    return np.array(shares)


def _joint(fit: Hierarchy, optimizer: str, target: tuple[float, float], runs: list[Point]) -> np.ndarray:
    """Covariance of (gain, losses of the runs with their noise) given the data, under one form."""
    problem, data = fit.problem, fit.problem.data
    prior, noise = problem.covariances(fit.phi)
    run, cell, size = np.exp(2 * fit.phi[len(fit.form.groups) :])
    gain = fit.gradient(data.optimizers[0], *target) - fit.gradient(optimizer, *target)
    rows = np.stack([gain, *(fit.gradient(*one) for one in runs)])
    index = np.array([data.optimizers.index(name) for name, _, _ in runs])
    n, d = np.array([n for _, n, _ in runs]), np.array([d for _, _, d in runs])
    fresh = np.zeros((len(rows), len(rows)))
    same_cell = (n[:, None] == n) & (d[:, None] == d)
    same_size = (index[:, None] == index) & (n[:, None] == n)
    fresh[1:, 1:] = run * np.eye(len(runs)) + cell * same_cell + size * same_size
    shared = np.zeros((len(rows), len(data)))
    shared[1:] = size * ((index[:, None] == data.index) & (n[:, None] == data.n))
    jacobian = fit.linear.jacobian
    across = rows @ prior @ jacobian.T + shared
    factor = cho_factor(jacobian @ prior @ jacobian.T + noise + np.diag(fit.extra), lower=True)
    return rows @ prior @ rows.T + fresh - across @ cho_solve(factor, across.T)


def _means(copies: Copies, base: str, optimizer: str, target: tuple[float, float], runs: list[Point]) -> np.ndarray:
    """Mean of (gain, losses of the runs) under one form."""
    gain = np.median(copies.losses(base, *target) - copies.losses(optimizer, *target))
    return np.array([gain, *(np.median(copies.losses(*one)) for one in runs)])


def _mixed(weights: np.ndarray, means: np.ndarray, variances: np.ndarray) -> float:
    mean = weights @ means
    return float(weights @ (variances + (means - mean) ** 2))


def _expected(
    weights: np.ndarray, gains: np.ndarray, losses: np.ndarray, forms: list[np.ndarray], rows: np.ndarray
) -> float:
    """Expected variance of the gain, over forms, after losses of `rows`: quasi-random outcomes of each form."""
    count = len(rows)
    z = norm.ppf(qmc.Sobol(count, seed=0).random(DRAWS))
    cross = np.stack([joint[0, rows] for joint in forms])
    within = np.stack([joint[np.ix_(rows, rows)] for joint in forms])
    roots = np.linalg.cholesky(within + 1e-14 * np.eye(count))
    slopes = np.stack([np.linalg.solve(w, c) for w, c in zip(within, cross)])
    left = np.array([joint[0, 0] for joint in forms]) - np.sum(slopes * cross, 1)
    inverses, sizes = np.linalg.inv(within), np.array([np.linalg.slogdet(w)[1] for w in within])
    total = 0.0
    for k, weight in enumerate(weights):
        outcomes = losses[k] + z @ roots[k].T
        off = outcomes[None] - losses[:, None]
        logs = -0.5 * (np.einsum("fsi,fij,fsj->fs", off, inverses, off) + sizes[:, None]) + np.log(weights)[:, None]
        now = np.exp(logs - logs.max(0))
        now /= now.sum(0)
        means = gains[:, None] + np.einsum("fsi,fi->fs", off, slopes)
        mean = np.sum(now * means, 0)
        total += weight * float(np.mean(np.sum(now * (left[:, None] + (means - mean) ** 2), 0)))
    return total
