"""Copies of a hierarchical law drawn from its posterior: spreads by quadrature, parameters given them in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, qmc

from megatron_opt.study.fits.forms import Form
from megatron_opt.study.fits.hierarchy import Hierarchy, Linear

NODES = 64
"""quasi-random points over the spreads"""
WIDEN = 1.3
"""nodes are drawn this much wider than the curvature at the mode says, and weighed back"""


@dataclass(frozen=True)
class Copies:
    """Equally likely copies of a law; row s of `core` and `own` belong together."""

    form: Form
    optimizers: tuple[str, ...]
    origin: tuple[float, float]
    core: np.ndarray
    """(copies, core_size)"""
    own: np.ndarray
    """(copies, optimizers, own_size); zeros for the baseline"""

    def __len__(self) -> int:
        return len(self.core)

    def losses(self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """(copies, *shape) final losses at N parameters and D tokens."""
        log_n, log_d = self._logs(n, d)
        k = self.optimizers.index(optimizer)
        extra = (1,) * log_n.ndim
        core = self.core.T.reshape(self.form.core_size, -1, *extra)
        own = self.own[:, k].T.reshape(self.form.own_size, -1, *extra)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.form.loss(core, own, log_n, log_d)

    def speedup(self, loss: np.ndarray, n: float, d: float) -> np.ndarray:
        """(copies,) tokens at which the baseline reaches a loss of each copy, over D; inf where it never does."""
        log_n, log_d = self._logs(n, d)
        with np.errstate(over="ignore"):
            return np.exp(self.form.tokens(self.core.T, loss, log_n) - log_d)

    def _logs(self, n: np.ndarray | float, d: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
        return np.log(n / self.origin[0]), np.log(d / self.origin[1])


def draw(fit: Hierarchy, copies: int, seed: int = 0) -> Copies:
    """Draw from p(x, φ | y); deterministic for a seed."""
    linear, rng = fit.linear, np.random.default_rng(seed)
    nodes, weights = _nodes(linear, fit.phi, seed)
    order = np.sort(qmc.Sobol(1, seed=seed).random(1 << (copies - 1).bit_length())[:copies, 0])
    chosen = np.minimum(np.searchsorted(np.cumsum(weights), order), len(nodes) - 1)
    drawn, wrong = np.empty((copies, len(fit.x))), np.empty(copies)
    problem = fit.problem
    for node in np.unique(chosen):
        mine = np.flatnonzero(chosen == node)
        mean, covariance = linear.posterior(nodes[node])
        values, vectors = np.linalg.eigh(covariance)
        # the symmetric root: signs of eigenvectors are the processor's, and would give each its own draws
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        drawn[mine] = mean + rng.standard_normal((len(mine), len(mean))) @ root
        exact = _losses(fit, drawn[mine]) - problem.data.loss
        straight = linear.loss + (drawn[mine] - fit.x) @ linear.jacobian.T - problem.data.loss
        precision = np.linalg.inv(problem.covariances(nodes[node])[1] + np.diag(fit.extra))
        wrong[mine] = 0.5 * (np.sum(straight @ precision * straight, 1) - np.sum(exact @ precision * exact, 1))
    # The law is not quite linear: weigh each copy by its true likelihood over the linear one, cut at √copies.
    weight = np.exp(wrong - np.nanmax(wrong))
    weight = np.nan_to_num(weight, nan=0.0)
    weight = np.minimum(weight, weight.mean() * np.sqrt(copies))
    points = (np.arange(copies) + 0.5) / copies
    kept = np.minimum(np.searchsorted(np.cumsum(weight) / weight.sum(), points), copies - 1)
    x = drawn[rng.permutation(kept)]
    form = fit.form
    own = np.zeros((copies, problem.others + 1, form.own_size))
    own[:, 1:] = x[:, form.core_size :].reshape(copies, problem.others, form.own_size)
    return Copies(form, problem.data.optimizers, problem.origin, x[:, : form.core_size], own)


def _losses(fit: Hierarchy, x: np.ndarray) -> np.ndarray:
    """(copies, observations) losses of copies of x at the fit's own data."""
    problem, form = fit.problem, fit.form
    own = np.zeros((len(x), problem.others + 1, form.own_size))
    own[:, 1:] = x[:, form.core_size :].reshape(len(x), problem.others, form.own_size)
    with np.errstate(over="ignore", invalid="ignore"):
        return form.loss(
            x[:, : form.core_size].T[:, :, None], np.moveaxis(own[:, problem.data.index], 2, 0), problem.n, problem.d
        )


def _nodes(linear: Linear, mode: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of φ and their weights under p(φ | y)."""
    step, size = 0.05, len(mode)
    base = linear.negative(mode)[0]
    slopes = np.array([linear.negative(mode + step * u)[1] - linear.negative(mode - step * u)[1] for u in np.eye(size)])
    hessian = (slopes + slopes.T) / (4 * step)
    # The prior's curvature is a lower bound that keeps flat directions finite.
    values, vectors = np.linalg.eigh(hessian)
    root = (vectors / np.sqrt(np.maximum(values, 0.3 / linear.problem.widths.max() ** 2))) @ vectors.T
    z = WIDEN * norm.ppf(qmc.Sobol(size, seed=seed).random(NODES))
    nodes = mode + z @ root
    logs = np.array([base - linear.negative(node)[0] for node in nodes]) + 0.5 * np.sum((z / WIDEN) ** 2, 1)
    weights = np.exp(logs - logs.max())
    return nodes, weights / weights.sum()
