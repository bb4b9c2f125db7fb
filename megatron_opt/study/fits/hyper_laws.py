"""How a tuned hyperparameter moves with scale: h(N, D) = α·N^−A·D^−B + β (arXiv 2509.02046, phase III)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.solver import solve

PRIOR_WIDTH = 0.5
"""standard deviation of the prior on A and B; published exponents of learning rates lie within 0.5"""


@dataclass(frozen=True)
class HyperLaw:
    """A fitted law of one hyperparameter of one optimizer; `theta` = (log α, A, B) or (log α, A, B,
    log β).
    """

    optimizer: str
    hyperparameter: str
    n: np.ndarray
    d: np.ndarray
    value: np.ndarray
    theta: np.ndarray
    draws: np.ndarray
    """(resamples, 3 or 4)"""
    spread: float
    """standard deviation of log h around the law"""

    def predict(self, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        return np.exp(self._log(self.theta, n, d))

    def interval(self, n: float, d: float, level: float = 0.9) -> tuple[float, float]:
        """Interval of the law's value at (N, D)."""
        copies = np.exp(np.array([float(self._log(theta, n, d)) for theta in self.draws]))
        low, high = interval(copies, level)
        return float(low), float(high)

    def _log(self, theta: np.ndarray, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        x, y = self._scaled(n, d)
        return _log_law(theta, x, y)[0]

    def _scaled(self, n: np.ndarray | float, d: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.log(np.asarray(n, float)) - np.log(self.n).mean(),
            np.log(np.asarray(d, float)) - np.log(self.d).mean(),
        )


def _log_law(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log h and its Jacobian in centered log N, log D."""
    power = theta[0] - theta[1] * x - theta[2] * y
    one = np.ones_like(power)
    if len(theta) == 3:
        return power, np.stack([one, -x, -y], -1)
    total = np.logaddexp(power, theta[3])
    share = np.exp(power - total)
    return total, np.stack([share, -x * share, -y * share, 1 - share], -1)


def fit_hyper_law(
    optimizer: str,
    hyperparameter: str,
    n: np.ndarray,
    d: np.ndarray,
    value: np.ndarray,
    *,
    grid_ratio: float = 2.0,
    resamples: int = 200,
    seed: int = 0,
) -> HyperLaw:
    """Least squares in log h, A and B held near zero by a weak prior.

    A grid of factor `grid_ratio` knows an optimum to a standard error of log(ratio)/√12. The offset β is
    fitted only
    where AICc asks for it. Raises UserError for fewer than three cells or values that are not positive.
    """
    n, d, value = (np.asarray(item, float) for item in (n, d, value))
    if len(value) < 3:
        raise UserError(f"the law of {hyperparameter} of {optimizer} needs three regimes, there are {len(value)}")
    if np.any(value <= 0):
        raise UserError(f"{hyperparameter} of {optimizer} is zero somewhere; a power law cannot describe it")
    x, y = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()
    known = np.log(grid_ratio) / np.sqrt(12)
    candidates = [_fit(x, y, np.log(value), known, None)]
    if len(value) > 6:
        candidates.append(_fit(x, y, np.log(value), known, np.log(value).min() - 1.0))
    theta = min(candidates, key=lambda theta: _aicc(theta, x, y, np.log(value)))
    fitted = _log_law(theta, x, y)[0]
    freedom = max(1, len(value) - len(theta))
    spread = max(known, float(np.sqrt(np.sum((fitted - np.log(value)) ** 2) / freedom)))
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [
            _fit(
                x,
                y,
                fitted + spread * rng.standard_normal(len(fitted)),
                spread,
                theta[3] if len(theta) == 4 else None,
            )
            for _ in range(resamples)
        ]
    )
    return HyperLaw(optimizer, hyperparameter, n, d, value, theta, draws, spread)


def _fit(x: np.ndarray, y: np.ndarray, log_h: np.ndarray, sigma: float, offset: float | None) -> np.ndarray:
    rows = np.zeros((2, 3 if offset is None else 4))
    rows[0, 1] = rows[1, 2] = 1 / PRIOR_WIDTH

    def function(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, jacobian = _log_law(theta, x, y)
        return np.concatenate([(values - log_h) / sigma, theta[1:3] / PRIOR_WIDTH]), np.vstack([jacobian / sigma, rows])

    start = [log_h.mean(), 0.1, 0.1] + ([] if offset is None else [offset])
    return solve(function, [np.array(start)]).x


def _aicc(theta: np.ndarray, x: np.ndarray, y: np.ndarray, log_h: np.ndarray) -> float:
    count, parameters = len(log_h), len(theta)
    spread = max(float(np.mean((_log_law(theta, x, y)[0] - log_h) ** 2)), 1e-6)
    return count * np.log(spread) + 2 * parameters + 2 * parameters * (parameters + 1) / max(1, count - parameters - 1)
