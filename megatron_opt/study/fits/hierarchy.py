"""A hierarchical law: optimizers deviate from common exponents and efficiencies by amounts whose spread is estimated.

Empirical Bayes. Around its current parameters x a law is linear, y = f + J·(x − x̂) + e, so given the spreads φ of all
groups of parameters and of the noise, the losses are Gaussian with covariance

    S(φ) = J·P0·Jᵀ + Σ_g e^(2φ_g)·J·P_g·Jᵀ + e^(2φ_run)·R_run + e^(2φ_cell)·R_cell + e^(2φ_size)·R_size

and log p(y | φ), its gradient and the posterior of x are in closed form. Gauss–Newton in x and quasi-Newton in φ
alternate; φ is then integrated over by quasi-random points about its mode (`posterior.py`). Two noises are common: to all
optimizers in one (N, D, seed), which cancels in differences, and to all budgets of an (optimizer, size), which does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.lapack import dpotrf, dpotri
from scipy.optimize import minimize

from megatron_opt.study.fits.forms import Form
from megatron_opt.study.fits.observations import Observations

NOISES = ("run", "cell", "size")
NOISE_WIDTH = 0.7
"""prior standard deviation of the log of a common noise; its median is COMMON times the noise of a run"""
COMMON = 0.4
STEEPEST = 1e6
"""nats that a parameter of order one may move a loss by: beyond, a law is no longer close to linear, and its squares overflow"""
WILD = 4.0
"""standard errors by which a loss must miss the law of all others to be weighed down"""


@dataclass(frozen=True)
class Noise:
    """What is known of the noise of one run before the fit."""

    sigma: float
    log_width: float = 0.5
    """standard deviation of log σ: wide where σ is assumed"""


class Problem:
    """Data and form in matrices: what does not depend on parameters."""

    def __init__(self, data: Observations, form: Form, noise: Noise, origin: tuple[float, float] | None = None):
        self.data, self.form, self.noise = data, form, noise
        self.origin = origin or (float(np.exp(np.log(data.n).mean())), float(np.exp(np.log(data.d).mean())))
        self.n, self.d = np.log(data.n / self.origin[0]), np.log(data.d / self.origin[1])
        self.others = len(data.optimizers) - 1
        self.size = form.core_size + form.own_size * self.others
        level = float(data.loss.mean())
        self.mean = np.zeros(self.size)
        self.mean[: form.core_size], deviation = form.prior(level, 0.05 * level)
        self.fixed = np.zeros((self.size, self.size))
        self.fixed[range(form.core_size), range(form.core_size)] = deviation**2
        self.priors = [self._group(group.columns, group.exchangeable) for group in form.groups]
        self.noises = self._noises()
        self.centers = np.log(
            [group.center for group in form.groups] + [noise.sigma, COMMON * noise.sigma, COMMON * noise.sigma]
        )
        self.widths = np.array([group.width for group in form.groups] + [noise.log_width, NOISE_WIDTH, NOISE_WIDTH])

    def own_index(self, optimizer: int) -> slice:
        """Where the own parameters of an optimizer (1, 2, …) stand in x."""
        start = self.form.core_size + self.form.own_size * (optimizer - 1)
        return slice(start, start + self.form.own_size)

    def _group(self, columns: tuple[int, ...], exchangeable: bool) -> np.ndarray:
        matrix = np.zeros((self.size, self.size))
        for column in columns:
            at = self.form.core_size + self.form.own_size * np.arange(self.others) + column
            matrix[np.ix_(at, at)] = np.eye(self.others) + (1.0 if exchangeable else 0.0)
        return matrix

    def _noises(self) -> list[np.ndarray]:
        data = self.data
        same_cell = (data.n[:, None] == data.n) & (np.abs(np.log(data.d[:, None] / data.d)) < 1e-3)
        same_size = (data.n[:, None] == data.n) & (data.index[:, None] == data.index)
        return [np.diag(1 / data.counts), same_cell * data.shared_seeds(), same_size.astype(float)]

    def values(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses (k,) and their Jacobian (k, p)."""
        form, index = self.form, self.data.index
        own = np.zeros((form.own_size, self.others + 1))
        own[:, 1:] = x[form.core_size :].reshape(self.others, form.own_size).T
        loss, by_core, by_own = form.jacobian(x[: form.core_size], own[:, index], self.n, self.d)
        jacobian = np.zeros((len(index), self.size))
        jacobian[:, : form.core_size] = by_core
        rows = np.flatnonzero(index > 0)
        columns = form.core_size + form.own_size * (index[rows] - 1)
        for j in range(form.own_size):
            jacobian[rows, columns + j] = by_own[rows, j]
        return loss, jacobian

    def covariances(self, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prior covariance P of x and noise covariance R of the losses."""
        scale = np.exp(2 * phi)
        groups = len(self.priors)
        prior = self.fixed + sum(s * m for s, m in zip(scale[:groups], self.priors))
        return prior, sum(s * m for s, m in zip(scale[groups:], self.noises))


class Linear:
    """The problem made linear at x: marginal likelihood of φ and posterior of x in closed form."""

    def __init__(self, problem: Problem, x: np.ndarray, extra: np.ndarray):
        self.problem, self.extra = problem, extra
        self.loss, self.jacobian = problem.values(x)
        self.target = problem.data.loss - self.loss + self.jacobian @ (x - problem.mean)
        self._fixed = self.jacobian @ problem.fixed @ self.jacobian.T + np.diag(extra)
        parts = [self.jacobian @ m @ self.jacobian.T for m in problem.priors] + problem.noises
        self._parts = np.stack([part.ravel() for part in parts])

    def _total(self, scale: np.ndarray) -> np.ndarray:
        """S(φ) for e^(2φ)."""
        return self._fixed + (scale @ self._parts).reshape(self._fixed.shape)

    def negative(self, phi: np.ndarray) -> tuple[float, np.ndarray]:
        """−log p(y | φ) − log p(φ) and its gradient."""
        problem, scale = self.problem, np.exp(2 * phi)
        # LAPACK itself: scipy's checks cost more than the work on a few dozen losses.
        factor, failed = dpotrf(self._total(scale), lower=1, overwrite_a=1)
        if failed:
            return 1e10, np.zeros_like(phi)
        lower, _ = dpotri(factor, lower=1)
        inverse = np.tril(lower) + np.tril(lower, -1).T
        alpha = inverse @ self.target
        off = (phi - problem.centers) / problem.widths
        value = np.log(np.diag(factor)).sum() + 0.5 * self.target @ alpha + 0.5 * off @ off
        gradient = scale * (self._parts @ (inverse - np.outer(alpha, alpha)).ravel()) + off / problem.widths
        return float(value), gradient

    def posterior(self, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of x given φ."""
        prior, noise = self.problem.covariances(phi)
        cross = prior @ self.jacobian.T
        factor = cho_factor(self.jacobian @ cross + noise + np.diag(self.extra), lower=True)
        gain = cho_solve(factor, cross.T).T
        return self.problem.mean + gain @ self.target, prior - gain @ cross.T

    def left_out(self, phi: np.ndarray) -> np.ndarray:
        """Each loss minus its prediction from all the others, in standard errors."""
        inverse = np.linalg.inv(self._total(np.exp(2 * phi)))
        return inverse @ self.target / np.sqrt(np.diag(inverse))


@dataclass(frozen=True)
class Hierarchy:
    """A fitted hierarchical law at the mode of its parameters x and spreads φ."""

    problem: Problem
    x: np.ndarray
    phi: np.ndarray
    extra: np.ndarray
    """variance added to wild losses"""

    @cached_property
    def linear(self) -> Linear:
        return Linear(self.problem, self.x, self.extra)

    @property
    def form(self) -> Form:
        return self.problem.form

    def gradient(self, optimizer: str, n: float, d: float) -> np.ndarray:
        """dL/dx at one point: what a run there would tell."""
        form, problem = self.form, self.problem
        k = problem.data.optimizers.index(optimizer)
        own = self.x[problem.own_index(k)] if k else np.zeros(form.own_size)
        logs = np.log([n / problem.origin[0]]), np.log([d / problem.origin[1]])
        _, by_core, by_own = form.jacobian(self.x[: form.core_size], own[:, None], *logs)
        slope = np.zeros(problem.size)
        slope[: form.core_size] = by_core[0]
        if k:
            slope[problem.own_index(k)] = by_own[0]
        return slope

    @property
    def spreads(self) -> dict[str, float]:
        """Standard deviations of groups and noises at the mode."""
        names = [group.name for group in self.form.groups] + [f"noise of {name}" for name in NOISES]
        return dict(zip(names, np.exp(self.phi).tolist()))

    @property
    def wild(self) -> np.ndarray:
        """Mask of losses that were weighed down."""
        return self.extra > 0


def _objective(problem: Problem, x: np.ndarray, phi: np.ndarray, extra: np.ndarray) -> float:
    prior, noise = problem.covariances(phi)
    offset = x - problem.mean
    # A tiny ridge: spreads may be driven to zero, which makes the prior singular.
    inside = np.linalg.solve(prior + 1e-12 * np.eye(len(x)), offset)
    with np.errstate(over="ignore", invalid="ignore"):
        loss, jacobian = problem.values(x)
        misfit = problem.data.loss - loss
        if not (np.isfinite(misfit).all() and np.abs(jacobian).max() < STEEPEST):
            return np.inf
        return float(misfit @ np.linalg.solve(noise + np.diag(extra), misfit) + offset @ inside)


def _move(problem: Problem, x: np.ndarray, phi: np.ndarray, extra: np.ndarray, steps: int) -> np.ndarray:
    """Gauss–Newton with step halving at fixed φ."""
    cost = _objective(problem, x, phi, extra)
    for _ in range(steps):
        aim = Linear(problem, x, extra).posterior(phi)[0]
        share = 1.0
        while share > 1e-3:
            candidate = x + share * (aim - x)
            new = _objective(problem, candidate, phi, extra)
            if new < cost:
                break
            share /= 2
        else:
            return x
        done, x, cost = cost - new < 1e-3, candidate, new
        if done:
            break
    return x


def fit_hierarchy(
    data: Observations,
    form: Form,
    noise: Noise,
    *,
    origin: tuple[float, float] | None = None,
    start: Hierarchy | None = None,
) -> Hierarchy:
    """Fit by alternating x and φ; `start`: a fit of the same form and optimizers to almost the same data."""
    problem = Problem(data, form, noise, origin)
    extra = np.zeros(len(data))
    x, phi = (problem.mean.copy(), problem.centers.copy()) if start is None else (start.x.copy(), start.phi.copy())
    for round_ in range(8):
        x = _move(problem, x, phi, extra, 12 if round_ == 0 else 3)
        linear = Linear(problem, x, extra)
        minimum = minimize(
            linear.negative, phi, jac=True, method="L-BFGS-B", bounds=_bounds(problem), options={"maxiter": 40}
        )
        change = float(np.abs(minimum.x - phi).max())
        phi = minimum.x
        left = np.abs(linear.left_out(phi))
        wild = left > WILD
        if round_ == 2 and wild.any() and not extra.any():
            extra = np.where(wild, np.exp(2 * phi[len(problem.priors)]) * (left / 2) ** 2, 0.0)
            continue
        if change < 0.02 and round_ > 0:
            break
    return Hierarchy(problem, _move(problem, x, phi, extra, 3), phi, extra)


def _bounds(problem: Problem) -> list[tuple[float, float]]:
    return [(c - 4 * w, c + 4 * w) for c, w in zip(problem.centers, problem.widths)]
