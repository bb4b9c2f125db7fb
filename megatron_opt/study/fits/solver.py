"""Robust non-linear least squares from several starts, on top of scipy's Levenberg–Marquardt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import leastsq

from megatron_opt.errors import UserError

Function = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""parameters (p,) → residuals in units of their standard error (n,), Jacobian (n, p)"""

HUBER = 2.0
"""residuals beyond this many standard errors count linearly"""


@dataclass(frozen=True)
class Solution:
    """The best of all starts."""

    x: np.ndarray
    cost: float
    residuals: np.ndarray
    jacobian: np.ndarray


def robust(residuals: np.ndarray, scale: float = HUBER) -> tuple[np.ndarray, np.ndarray]:
    """Residuals whose squares are the pseudo-Huber loss 2c²(√(1+(r/c)²) − 1), and their derivative by r.

    The transform lets a plain least-squares solver minimise the robust loss exactly.
    """
    root = np.hypot(1.0, residuals / scale)
    # r·√(2/(1+root)) is the same quantity without the cancellation of root − 1 near zero.
    transformed = residuals * np.sqrt(2 / (1 + root))
    slope = np.sqrt((1 + root) / 2) / root
    return transformed, slope


def solve(function: Function, starts: Iterable[np.ndarray], tolerance: float = 1e-10) -> Solution:
    """Minimise the robust sum of squares from every start and keep the lowest; raises UserError for fewer residuals than unknowns."""
    best: Solution | None = None
    with np.errstate(over="ignore", invalid="ignore"):
        for start in starts:
            if best is None and (count := len(function(start)[0])) < len(start):
                raise UserError(
                    f"{count} results and priors do not determine the {len(start)} parameters of a joint law; run more regimes"
                )
            evaluate = _Once(function)
            try:
                x, *_ = leastsq(
                    evaluate.residuals,
                    start,
                    Dfun=evaluate.jacobian,
                    full_output=True,
                    xtol=tolerance,
                    ftol=tolerance,
                    gtol=tolerance,
                    maxfev=400,
                )
            except (ValueError, np.linalg.LinAlgError):
                continue
            values, slopes = function(x)
            cost = float(np.sum(robust(values)[0] ** 2)) / 2
            if np.isfinite(cost) and (best is None or cost < best.cost):
                best = Solution(x, cost, values, slopes)
    if best is None:
        raise FloatingPointError("no start of the fit led to a finite loss")
    return best


class _Once:
    """Residuals and Jacobian at the same point cost one evaluation."""

    def __init__(self, function: Function):
        self._function, self._at = function, np.empty(0)
        self._values: tuple[np.ndarray, np.ndarray] = (self._at, self._at)

    def _evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not np.array_equal(x, self._at):
            self._at, self._values = x.copy(), self._function(x)
        return self._values

    def residuals(self, x: np.ndarray) -> np.ndarray:
        return robust(self._evaluate(x)[0])[0]

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        values, slopes = self._evaluate(x)
        return robust(values)[1][:, None] * slopes
