"""Intervals from bootstrap copies."""

from __future__ import annotations

import numpy as np

LEVEL = 0.9


def interval(draws: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Equal-tailed interval over the first axis; infinite copies are allowed.

    Weibull's plotting positions (n + 1)p cover at the nominal rate whatever the number of copies; the usual
    (n − 1)p
    is too narrow by a few per cent.
    """
    draws = np.asarray(draws, float)
    tail = (1 - level) / 2
    # Interpolation between a number and infinity is undefined; whole order statistics are not.
    if np.isinf(draws).any():
        low, high = np.quantile(draws, [tail, 1 - tail], axis=0, method="inverted_cdf")
    else:
        low, high = np.quantile(draws, [tail, 1 - tail], axis=0, method="weibull")
    return low, high
