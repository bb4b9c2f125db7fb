"""The baseline's L(D) at one model size, and what another optimizer's loss is worth in its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from megatron_opt.errors import UserError


@dataclass(frozen=True)
class PowerLaw:
    """L(D) = α·D^−B + β."""

    alpha: float
    exponent: float
    beta: float
    residuals: np.ndarray

    def loss(self, d: np.ndarray | float) -> np.ndarray:
        return self.alpha * np.asarray(d, float) ** -self.exponent + self.beta

    def tokens(self, loss: np.ndarray | float) -> np.ndarray:
        """D at which the law reaches a loss: ((L−β)/α)^(−1/B); inf at or below β."""
        left = (np.asarray(loss, float) - self.beta) / self.alpha
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(left > 0, np.abs(left) ** (-1 / self.exponent), np.inf)

    def speedup(self, loss: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Tokens the baseline needs for this loss, over the tokens that were spent (arXiv 2509.02046, 3)."""
        return self.tokens(loss) / np.asarray(d, float)


def fit_power_law(d: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Least squares of α·D^−B + β on at least three budgets; raises UserError with fewer.

    For a given B the law is linear, so the search is over B alone: a grid, then Brent's method around its
    best.
    """
    d, loss = np.asarray(d, float), np.asarray(loss, float)
    if len(np.unique(d)) < 3:
        raise UserError(f"L(D) needs three budgets of the baseline at each size, there are {len(np.unique(d))}")
    log_d = np.log(d) - np.log(d).min()

    def linear(log_b: float) -> tuple[float, float, np.ndarray]:
        x = np.exp(-np.exp(log_b) * log_d)
        alpha = float(np.sum((x - x.mean()) * (loss - loss.mean())) / np.sum((x - x.mean()) ** 2))
        beta = float(loss.mean() - alpha * x.mean())
        return alpha, beta, alpha * x + beta - loss

    def cost(log_b: float) -> float:
        return float(np.sum(linear(log_b)[2] ** 2))

    grid = np.linspace(np.log(0.01), np.log(5.0), 60)
    i = int(np.argmin([cost(log_b) for log_b in grid]))
    bounds = (grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)])
    minimum = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-10})
    alpha, beta, residuals = linear(minimum.x)
    exponent = float(np.exp(minimum.x))
    return PowerLaw(alpha * float(d.min()) ** exponent, exponent, beta, residuals)
