"""The simplest law of the paired gain, g = c·N^−p·(D/N)^−q for one optimizer alone: what a richer law has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_opt.study.fits.ensemble import Backtest
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.solver import solve


@dataclass(frozen=True)
class GainLaw:
    """c·(N/N0)^−p·((D/N)/r0)^−q with the covariance of (c, p, q) from its residuals."""

    theta: np.ndarray
    covariance: np.ndarray
    sigma: float
    freedom: int
    origin: tuple[float, float]

    def predict(self, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Gain at N parameters and D tokens."""
        return self._law(self.theta, *self._logs(n, d))[0]

    def interval(self, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """90% interval of a measured gain: Student's t with the law's and the residuals' spread."""
        value, jacobian = self._law(self.theta, *self._logs(n, d))
        spread = np.sqrt(np.einsum("ij,jk,ik->i", jacobian, self.covariance, jacobian) + self.sigma**2)
        reach = stats.t(self.freedom).ppf(0.95) * spread
        return value - reach, value + reach

    def _logs(self, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.log(n / self.origin[0]), np.log(d / n / self.origin[1])

    @staticmethod
    def _law(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = np.exp(-theta[1] * x - theta[2] * y)
        return theta[0] * shape, np.stack([shape, -theta[0] * x * shape, -theta[0] * y * shape], -1)


def paired_gains(data: Observations, optimizer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D and loss of the baseline minus loss of the optimizer, over the cells that have both."""
    k = data.optimizers.index(optimizer)
    pairs = []
    for n, d, loss in zip(*(a[data.index == k] for a in (data.n, data.d, data.loss))):
        base = data.loss[(data.index == 0) & (data.n == n) & (np.abs(np.log(data.d / d)) < 1e-3)]
        if len(base):
            pairs.append((n, d, base[0] - loss))
    return tuple(np.array(pairs).T) if pairs else (np.empty(0),) * 3


def fit_gain_law(n: np.ndarray, d: np.ndarray, gain: np.ndarray) -> GainLaw:
    """Least squares on at least five cells of two sizes; raises ValueError with fewer."""
    if len(gain) < 5 or len(np.unique(n)) < 2:
        raise ValueError("the law of a gain needs five cells of two sizes")
    origin = float(np.exp(np.log(n).mean())), float(np.exp(np.log(d / n).mean()))
    x, y = np.log(n / origin[0]), np.log(d / n / origin[1])
    scale = max(float(np.std(gain)), 1e-6)

    def function(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value, jacobian = GainLaw._law(theta, x, y)
        # A faint pull keeps p and q finite where a gain is near zero.
        pull = np.array([0.0, 1.0, 1.0]) * 1e-2
        return np.concatenate([(value - gain) / scale, pull * theta]), np.vstack([jacobian / scale, np.diag(pull)])

    starts = [np.array([gain.mean(), p, q]) for p in (0.0, 0.5) for q in (0.0, 0.5)]
    theta = solve(function, starts).x
    value, jacobian = GainLaw._law(theta, x, y)
    freedom = len(gain) - 3
    sigma = float(np.sqrt(np.sum((value - gain) ** 2) / freedom))
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * sigma**2
    return GainLaw(theta, covariance, sigma, freedom, origin)


@dataclass(frozen=True)
class GainCheck:
    """Held-out gains by this law: arrays over the rows of the last backtest that it could predict."""

    rows: np.ndarray
    """rows of the backtest's data"""
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray


def check_gain_law(backtests: tuple[Backtest, ...], data: Observations) -> GainCheck | None:
    """Predict the largest size's gains from the smaller sizes, one optimizer at a time; None where none can be."""
    if not backtests:
        return None
    test = backtests[-1]
    known = data.where(data.n < test.data.n.min())
    parts = []
    for k in np.unique(test.data.index[test.data.index > 0]):
        rows = np.flatnonzero((test.data.index == k) & np.isfinite(test.observed_gain))
        try:
            law = fit_gain_law(*paired_gains(known, data.optimizers[k]))
        except (ValueError, FloatingPointError):
            continue
        n, d = test.data.n[rows], test.data.d[rows]
        parts.append((rows, law.predict(n, d), *law.interval(n, d)))
    return GainCheck(*(np.concatenate(column) for column in zip(*parts))) if parts else None
