"""How a tuned hyperparameter moves with scale: h(N, D) = α·N^−A·D^−B (arXiv 2509.02046, phase III), known from grids.

Optima are points with standard errors (`optima.py`). All optimizers of a family share mean exponents, from which each
deviates: log h = α_k − A_k·x − B_k·y + e, A_k ~ N(Ā, τ²), B_k ~ N(B̄, τ²), e ~ N(0, s² + error²). Given τ and s this is
linear and Gaussian; both come from the marginal likelihood. The interval is that of the value which tuning a further
regime on such a grid would find, s and the grid's error included, scaled by a backtest on the largest size left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm

from megatron_opt.errors import UserError
from megatron_opt.study.fits.optima import Optimum

PRIOR_WIDTH = 0.5
"""standard deviation of the prior on mean exponents; published exponents of learning rates lie within 0.5"""
FAMILIES = {
    "element-wise": ("adamw", "nadamw", "mars", "cautious", "adam_mini", "sophia"),
    "sign": ("lion", "signum"),
    "matrix": ("muon", "muonh", "muon_h", "normuon", "scion", "scion_h", "soap", "kron"),
}
"""optimizers whose exponents are pooled; any other is alone"""
TRUST = 4.0
"""how many backtested values the model's own intervals are worth"""


@dataclass(frozen=True)
class HyperLaw:
    """A fitted law of one hyperparameter of one optimizer; `theta` = (log α, A, B) at the center of its data."""

    optimizer: str
    hyperparameter: str
    n: np.ndarray
    d: np.ndarray
    value: np.ndarray
    """tuned values, on the grid"""
    theta: np.ndarray
    covariance: np.ndarray
    spread: float
    """s: standard deviation of log h of a regime around the law"""
    center: tuple[float, float]
    """mean log N and log D"""
    error: float = 0.0
    """median standard error of an optimum: the grid's"""
    widen: float = 1.0
    """λ of the backtest"""
    tested: tuple[int, int] = (0, 0)
    """held-out optima of this family inside their 90% interval before λ, of how many"""
    curvature: float | None = None
    """median second derivative of the loss by log h; None where no regime shows it"""

    def predict(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Median of h at N parameters and D tokens."""
        return np.exp(self._row(n, d) @ self.theta)

    def interval(self, n: float, d: float, level: float = 0.9) -> tuple[float, float]:
        """Interval of the tuned value of a regime at (N, D)."""
        row = self._row(n, d)
        variance = row @ self.covariance @ row + self.spread**2 + self.error**2
        reach = float(norm.ppf((1 + level) / 2)) * self.widen * np.sqrt(variance)
        middle = float(row @ self.theta)
        return float(np.exp(middle - reach)), float(np.exp(middle + reach))

    def exponents(self, level: float = 0.9) -> np.ndarray:
        """(2, 2): ends of the intervals of A and B."""
        reach = float(norm.ppf((1 + level) / 2)) * np.sqrt(np.diag(self.covariance)[1:])
        return np.array([self.theta[1:] - reach, self.theta[1:] + reach])

    def price(self, n: float, d: float) -> float | None:
        """Loss that using the law's value costs if the optimum lies at an end of the interval: ½·curvature·(log h₁/h₀)²."""
        if self.curvature is None:
            return None
        low, high = self.interval(n, d)
        return 0.5 * self.curvature * (np.log(high / low) / 2) ** 2

    def _row(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        x, y = np.log(np.asarray(n, float)) - self.center[0], np.log(np.asarray(d, float)) - self.center[1]
        return np.stack([np.ones_like(x), -x, -y], -1)


def family_of(optimizer: str) -> str:
    """The family whose exponents an optimizer shares."""
    return next((name for name, members in FAMILIES.items() if optimizer in members), optimizer)


def fit_hyper_laws(hyperparameter: str, optima: dict[str, list[Optimum]]) -> list[HyperLaw]:
    """Laws of one hyperparameter of several optimizers (name → optima), pooled by family and backtested."""
    laws = []
    for family in dict.fromkeys(family_of(name) for name in optima):
        members = {name: one for name, one in optima.items() if family_of(name) == family}
        fitted = _fit(hyperparameter, members)
        scale, inside = _backtest(hyperparameter, members)
        laws += [replace(law, widen=scale, tested=inside) for law in fitted]
    return laws


def fit_hyper_law(
    optimizer: str,
    hyperparameter: str,
    n: np.ndarray,
    d: np.ndarray,
    value: np.ndarray,
    *,
    grid_ratio: float = 2.0,
) -> HyperLaw:
    """The law of one optimizer from tuned values alone, each known to log(grid_ratio)/√12.

    Raises UserError for fewer than three regimes or values that are not positive.
    """
    value = np.asarray(value, float)
    if len(value) < 3:
        raise UserError(f"the law of {hyperparameter} of {optimizer} needs three regimes, there are {len(value)}")
    if np.any(value <= 0):
        raise UserError(f"{hyperparameter} of {optimizer} is zero somewhere; a power law cannot describe it")
    error = float(np.log(grid_ratio) / np.sqrt(12))
    known = [
        Optimum(float(a), float(b), float(np.log(h)), error, None, float(h), False) for a, b, h in zip(n, d, value)
    ]
    return fit_hyper_laws(hyperparameter, {optimizer: known})[0]


def _fit(hyperparameter: str, members: dict[str, list[Optimum]]) -> list[HyperLaw]:
    points = [(k, one) for k, optima in enumerate(members.values()) for one in optima]
    count = len(members)
    log_n, log_d = (np.array([np.log(v) for v in column]) for column in zip(*((o.n, o.d) for _, o in points)))
    center = float(log_n.mean()), float(log_d.mean())
    target, error = (np.array(column) for column in zip(*((o.log_value, o.error) for _, o in points)))
    mean = target.mean()
    design = np.zeros((len(points), 3 * count))
    for row, ((k, _), x, y) in enumerate(zip(points, log_n - center[0], log_d - center[1])):
        design[row, [3 * k, 3 * k + 1, 3 * k + 2]] = 1.0, -x, -y

    def prior(tau: float) -> np.ndarray:
        matrix = np.kron(np.eye(count), np.diag([9.0, tau**2, tau**2]))
        return matrix + np.kron(np.ones((count, count)), np.diag([0.0, PRIOR_WIDTH**2, PRIOR_WIDTH**2]))

    def negative(logs: np.ndarray) -> float:
        spread, tau = np.exp(logs)
        total = design @ prior(tau) @ design.T + np.diag(error**2 + spread**2)
        factor = np.linalg.cholesky(total)
        white = np.linalg.solve(factor, target - mean)
        off = (logs - np.log([0.15, 0.1])) / 0.7
        return float(np.log(np.diag(factor)).sum() + 0.5 * white @ white + 0.5 * off @ off)

    logs = minimize(negative, np.log([0.15, 0.1]), method="Nelder-Mead", options={"xatol": 0.02, "fatol": 0.01}).x
    spread, tau = np.exp(logs)
    cross = prior(tau) @ design.T
    gain = np.linalg.solve(design @ cross + np.diag(error**2 + spread**2), cross.T).T
    theta = gain @ (target - mean)
    covariance = prior(tau) - gain @ cross.T
    curved = [one.curvature for _, one in points if one.curvature]
    laws = []
    for k, (name, optima) in enumerate(members.items()):
        block = slice(3 * k, 3 * k + 3)
        laws.append(
            HyperLaw(
                name,
                hyperparameter,
                np.array([o.n for o in optima]),
                np.array([o.d for o in optima]),
                np.array([o.tuned for o in optima]),
                theta[block] + [mean, 0.0, 0.0],
                covariance[block, block],
                float(spread),
                center,
                float(np.median(error)),
                curvature=float(np.median(curved)) if curved else None,
            )
        )
    return laws


def _backtest(hyperparameter: str, members: dict[str, list[Optimum]]) -> tuple[float, tuple[int, int]]:
    """λ and coverage of the optima of the largest size, predicted from the smaller ones."""
    largest = max(one.n for optima in members.values() for one in optima)
    known = {name: [one for one in optima if one.n < largest] for name, optima in members.items()}
    known = {name: optima for name, optima in known.items() if len(optima) >= 3}
    squares, count, inside = 0.0, 0, 0
    for law in _fit(hyperparameter, known) if known else []:
        for one in members[law.optimizer]:
            if one.n == largest:
                row = law._row(one.n, one.d)
                error = np.sqrt(row @ law.covariance @ row + law.spread**2 + one.error**2)
                z = abs(one.log_value - row @ law.theta) / error
                squares, count, inside = squares + z**2, count + 1, inside + int(z < norm.ppf(0.95))
    return float(np.sqrt(max(1.0, (TRUST + squares) / (TRUST + count)))), (inside, count)
