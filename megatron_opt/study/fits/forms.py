"""The forms of law that the hierarchy averages over: a level of the baseline, and how a gain over it moves with scale.

Level, in n = log N/N0 and d = log D/D0, with the loss L0 and the slopes s_N, s_D at the center of the data as parameters:

    L(n, d) = L0 + T·[(w·e^(−a·n/κ) + (1 − w)·e^(−b·d/κ))^κ − 1],   T = s_N/a + s_D/b,   w = (s_N/a)/T

This is E + (u + v)^κ with E = L0 − T: κ = 1 is E + A/N^a + B/D^b (arXiv 2203.15556), κ < 1 couples model and data.
Slopes and level are what data determine, so that the fit is close to linear in its parameters.

Gain of an optimizer, in n and y = log (D/N)/(D0/N0):

    exponents    its own ρ_N, ρ_D (arXiv 2602.07712) and own exponents a, b (and κ); irreducible loss shared
    irreducible  the same with its own irreducible loss
    power        L − c·e^(−p·n − q·y): never reaches zero
    levelling    L − c·[f + (1 − f)·e^(−p·n)]·e^(−q·y): decays to a share f of its value at the center
    log-linear   L(n, d + s·(1 − p·n − q·y)): the log of the speedup falls in a straight line and may cross zero
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVELS = ("coupled", "additive")
EXPONENT = 0.25
"""prior median of a and b"""
GAINS = ("exponents", "irreducible", "power", "levelling", "log-linear")
DIRECT = ("power", "levelling", "log-linear")
"""gains with a size and two rates of their own"""


@dataclass(frozen=True)
class Group:
    """Parameters of the optimizers whose spread is estimated together."""

    name: str
    columns: tuple[int, ...]
    """of an optimizer's own parameters"""
    center: float
    """prior median of the spread"""
    width: float
    """prior standard deviation of the log of the spread"""
    exchangeable: bool
    """the baseline deviates from the common value as the others do, so differences to it correlate by one half"""


@dataclass(frozen=True)
class Form:
    """One level with one kind of gain."""

    level: str
    gain: str

    @property
    def name(self) -> str:
        return f"{self.level}, {self.gain}"

    @property
    def level_size(self) -> int:
        return 6 if self.level == "coupled" else 5

    @property
    def core_size(self) -> int:
        """Parameters that all optimizers share: L0, log s_N, log s_D, log a, log b, [log κ], [p, q], [logit f]."""
        return self.level_size + (2 if self.gain in DIRECT else 0) + (self.gain == "levelling")

    @property
    def own_size(self) -> int:
        """Parameters of each optimizer but the baseline."""
        if self.gain in DIRECT:
            return 3
        return 4 + (self.level == "coupled") + (self.gain == "irreducible")

    @property
    def groups(self) -> tuple[Group, ...]:
        """Own parameters by common spread: the prior's only numbers, all as medians and log-widths."""
        if self.gain in ("power", "levelling"):
            return Group("gain", (0,), 0.02, 1.0, False), Group("decay", (1, 2), 0.1, 1.0, False)
        if self.gain == "log-linear":
            return Group("speedup", (0,), 0.15, 1.0, False), Group("decay", (1, 2), 0.1, 1.0, False)
        last = (4,) if self.level == "coupled" else ()
        groups = [
            Group("rho_N", (0,), 0.08, 1.0, False),
            Group("rho_D", (1,), 0.12, 1.0, False),
            Group("exponents", (2, 3, *last), 0.05, 1.0, True),
        ]
        if self.gain == "irreducible":
            groups.append(Group("irreducible", (self.own_size - 1,), 0.01, 1.0, True))
        return tuple(groups)

    def prior(self, level: float, slope: float) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the core; exponents from 0.11 to 0.57 (90%), arXiv 2001.08361 to 2203.15556."""
        mean = [level, np.log(slope), np.log(slope), np.log(EXPONENT), np.log(EXPONENT)]
        deviation = [1.0, 1.0, 1.0, 0.5, 0.5]
        if self.level == "coupled":
            mean, deviation = [*mean, np.log(0.5)], [*deviation, 0.5]
        if self.gain in ("power", "levelling"):
            mean, deviation = [*mean, 0.3, 0.3], [*deviation, 0.3, 0.3]
        if self.gain == "levelling":
            mean[-2] = 0.6
            mean, deviation = [*mean, -0.8], [*deviation, 1.0]
        if self.gain == "log-linear":
            mean, deviation = [*mean, 0.1, 0.0], [*deviation, 0.3, 0.3]
        return np.array(mean), np.array(deviation)

    def loss(self, core: np.ndarray, own: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Losses; `core` (core_size, …) and `own` (own_size, …) broadcast with n and d; zeros are the baseline."""
        if self.gain == "power":
            p, q = core[self.level_size] + own[1], core[self.level_size + 1] + own[2]
            return self._level(core, n, d) - own[0] * np.exp(-p * n - q * (d - n))
        if self.gain == "levelling":
            p, q = core[self.level_size] + own[1], core[self.level_size + 1] + own[2]
            share = 1 / (1 + np.exp(-core[self.level_size + 2]))
            return self._level(core, n, d) - own[0] * (share + (1 - share) * np.exp(-p * n)) * np.exp(-q * (d - n))
        if self.gain == "log-linear":
            p, q = core[self.level_size] + own[1], core[self.level_size + 1] + own[2]
            return self._level(core, n, d + own[0] * (1 - p * n - q * (d - n)))
        kappa = own[4] if self.level == "coupled" else 0.0
        value = self._level(core, n + own[0], d + own[1], own[2], own[3], kappa)
        return value + own[self.own_size - 1] if self.gain == "irreducible" else value

    def _level(
        self,
        core: np.ndarray,
        n: np.ndarray,
        d: np.ndarray,
        more_a: np.ndarray | float = 0.0,
        more_b: np.ndarray | float = 0.0,
        more_kappa: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        amount, share, a, b, kappa = self._shape(core)
        a, b, kappa = a * np.exp(more_a), b * np.exp(more_b), kappa * np.exp(more_kappa)
        inside = share * np.exp(-a * n / kappa) + (1 - share) * np.exp(-b * d / kappa)
        return core[0] + amount * (inside**kappa - 1)

    def _shape(self, core: np.ndarray) -> tuple[np.ndarray, ...]:
        """T, w, a, b, κ."""
        a, b = np.exp(core[3]), np.exp(core[4])
        by_n, by_d = np.exp(core[1]) / a, np.exp(core[2]) / b
        kappa = np.exp(core[5]) if self.level == "coupled" else np.ones_like(a)
        return by_n + by_d, by_n / (by_n + by_d), a, b, kappa

    def tokens(self, core: np.ndarray, loss: np.ndarray, n: np.ndarray) -> np.ndarray:
        """log D/D0 at which the baseline reaches a loss at a size; inf where it never does."""
        amount, share, a, b, kappa = self._shape(core)
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = (np.maximum((loss - core[0]) / amount + 1, 0.0)) ** (1 / kappa)
            left = (inside - share * np.exp(-a * n / kappa)) / (1 - share)
            return np.where(left > 0, -kappa / b * np.log(np.where(left > 0, left, 1.0)), np.inf)

    def jacobian(
        self, core: np.ndarray, own: np.ndarray, n: np.ndarray, d: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses (k,), derivatives by core (k, core_size) and by own (k, own_size); `own` is (own_size, k).

        Complex steps: exact to rounding, and one expression serves value and derivative.
        """
        size, step = self.core_size + self.own_size, 1e-30
        points = np.concatenate([np.broadcast_to(core[:, None], (len(core), len(n))), own]).astype(complex)
        points = np.broadcast_to(points[:, None], (size, size, len(n))).copy()
        points[np.arange(size), np.arange(size)] += 1j * step
        values = self.loss(points[: self.core_size], points[self.core_size :], n, d)
        slopes = values.imag.T / step
        return values[0].real, slopes[:, : self.core_size], slopes[:, self.core_size :]


FORMS = tuple(Form(level, gain) for level in LEVELS for gain in GAINS)
