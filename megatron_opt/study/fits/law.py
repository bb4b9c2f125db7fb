"""The formula of a joint scaling law and its derivatives, in N/N0 and D/D0.

    L(N, D) = E + (u + v)^κ,   u = (A (ρ_N N)^−a)^(1/κ),   v = (B (ρ_D D)^−b)^(1/κ)

κ = 1 is the additive law of arXiv 2203.15556, E + A/N^a + B/D^b. κ < 1 couples model and data (arXiv
2001.08361
has this form with E = 0, arXiv 2502.08606 with E): where one of the two is the bottleneck, the other helps
less.
"""

from __future__ import annotations

import numpy as np

CORE = 6
"""log E, log A, a, log B, b, log κ; then log ρ_N, log ρ_D of each optimizer after the first"""


def law(x: np.ndarray, index: np.ndarray, log_n: np.ndarray, log_d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses (n,) and their Jacobian (n, p) by the parameters x (p,); `index` picks each point's
    optimizer.
    """
    log_n, log_d, column = _effective(x, index, log_n, log_d)
    k = np.exp(x[5])
    log_u, log_v = x[1] - x[2] * log_n, x[3] - x[4] * log_d
    log_sum = np.logaddexp(log_u / k, log_v / k)
    term = np.exp(k * log_sum)
    by_u, by_v = term * np.exp(log_u / k - log_sum), term * np.exp(log_v / k - log_sum)
    jacobian = np.zeros((len(log_n), len(x)))
    jacobian[:, 0] = np.exp(x[0])
    jacobian[:, 1], jacobian[:, 2] = by_u, -by_u * log_n
    jacobian[:, 3], jacobian[:, 4] = by_v, -by_v * log_d
    jacobian[:, 5] = k * term * log_sum - (by_u * log_u + by_v * log_v)
    extra = np.flatnonzero(index > 0)
    if len(x) > CORE:
        jacobian[extra, column[extra]] = -x[2] * by_u[extra]
        jacobian[extra, column[extra] + 1] = -x[4] * by_v[extra]
    return np.exp(x[0]) + term, jacobian


def tokens_for(x: np.ndarray, index: int, loss: np.ndarray, log_n: np.ndarray) -> np.ndarray:
    """log(D/D0) at which the law reaches a loss at a model size; inf where it never does."""
    shift_n, shift_d = (x[CORE + 2 * (index - 1)], x[CORE + 2 * (index - 1) + 1]) if index else (0.0, 0.0)
    k = np.exp(x[5])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_sum = np.log(loss - np.exp(x[0])) / k
        log_u = (x[1] - x[2] * (log_n + shift_n)) / k
        log_v = k * (log_sum + np.log1p(-np.exp(log_u - log_sum)))
    reached = np.isfinite(log_v)
    return np.where(reached, (x[3] - np.where(reached, log_v, 0.0)) / x[4] - shift_d, np.inf)


def _effective(
    x: np.ndarray, index: np.ndarray, log_n: np.ndarray, log_d: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log(ρ_N N), log(ρ_D D), and the column of each point's log ρ_N."""
    column = CORE + 2 * (index - 1)
    if len(x) == CORE:
        return log_n, log_d, column
    padded = np.concatenate([x, [0.0, 0.0]])
    column = np.where(index > 0, column, len(x))
    return log_n + padded[column], log_d + padded[column + 1], column
