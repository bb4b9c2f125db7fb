"""All forms of law at once, weighed by how well each predicted the largest size left out, and widened by backtests.

Weights are exp(score/2) over the forms, score = log predictive density of the losses of the largest size by a fit to the
smaller ones; half of it, since one held-out size is one sample. Backtests hold out each size in turn, from the second to
the largest, and predict it from the sizes below with the weights that those sizes give by themselves. Their errors in
standard errors widen every interval beyond the measured sizes: λ² = (ν + Σz²)/(ν + n), never below 1, with the ν = 4
samples of prior trust in the model. λ grows from 1 at the largest size to its full value at the backtests' factor in N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.fits.forms import FORMS, Form
from megatron_opt.study.fits.hierarchy import Hierarchy, Noise, Problem, fit_hierarchy
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.posterior import Copies, draw

COPIES = 2000
TRUST = 4.0
"""ν: how many backtested values the model's own intervals are worth"""
LEAST_SCALE = {"loss": 1.0, "gain": 0.9}
TEMPER = 0.5
LEAST_WEIGHT = 0.02
"""forms below this weight are left out"""
BACKTESTS = 3
"""the largest sizes that are held out in turn"""


@dataclass(frozen=True)
class Backtest:
    """One size predicted from the smaller ones; arrays have one entry a held-out loss."""

    factor: float
    """the held-out size over the largest one in the fit"""
    sizes: int
    """sizes in the fit"""
    data: Observations
    loss: np.ndarray
    """(copies, losses) predicted, with no noise of a run"""
    gain: np.ndarray
    """(copies, losses) predicted losses of the baseline in the same cell minus the loss"""
    noise: np.ndarray
    """covariance of the noise of the losses"""
    scores: dict[str, float]
    """form → log predictive density"""

    @property
    def observed_gain(self) -> np.ndarray:
        """Loss of the baseline in the same cell minus the loss; nan where the baseline has none."""
        return _over_baseline(self.data, self.data.loss[None])[0]

    @property
    def error(self) -> np.ndarray:
        """Predicted minus observed loss."""
        return np.median(self.loss, 0) - self.data.loss

    @property
    def gain_error(self) -> np.ndarray:
        """Predicted minus observed gain; nan for the baseline's own rows."""
        error = np.median(self.gain, 0) - self.observed_gain
        return np.where(self.data.index == 0, np.nan, error)

    def intervals(self, what: str, widen: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """90% intervals of the observed `loss` or `gain`, noise of the runs included."""
        copies = self.loss if what == "loss" else self.gain
        middle = np.median(copies, 0)
        noise = np.random.default_rng(seed).multivariate_normal(np.zeros(len(self.noise)), self.noise, len(copies))
        if what == "gain":
            noise = _over_baseline(self.data, noise)
        return interval(middle + widen * (copies - middle) + noise)

    def standard_errors(self, what: str) -> np.ndarray:
        """Mean error over the budgets of each optimizer (loss: of the baseline alone), in standard errors."""
        errors = []
        noise = np.linalg.cholesky(self.noise + 1e-14 * np.eye(len(self.noise)))
        wanted = [0] if what == "loss" else np.unique(self.data.index[self.data.index > 0])
        for k in wanted:
            rows = np.flatnonzero((self.data.index == k) & np.isfinite(self.observed_gain))
            if not len(rows):
                continue
            mean = np.zeros(len(self.data))
            mean[rows] = 1 / len(rows)
            if what == "loss":
                error, spread = self.error[rows].mean(), (self.loss @ mean).std()
            else:
                error, spread = self.gain_error[rows].mean(), (self.gain[:, rows].mean(1)).std()
                for row in rows:
                    mean = mean - _unit(len(mean), _base_row(self.data, int(row))) / len(rows)
            errors.append(error / np.hypot(spread, np.linalg.norm(mean @ noise)))
        return np.array(errors)


@dataclass(frozen=True)
class Calibration:
    """How wide intervals are drawn beyond the measured sizes, over what the model says, and on what grounds."""

    loss: float
    gain: float
    """λ of the baseline's loss and of gains"""
    factor: float
    """the largest factor in N that a backtest reached"""
    floor: dict[float, float]
    """Chinchilla-like ratio D/N → half-width of the backtest's 90% interval of a gain: none is quoted below it"""
    values: int
    """backtested values behind λ of the gain"""

    def widen(self, what: str, reach: np.ndarray) -> np.ndarray:
        """λ for sizes `reach` times the largest measured one."""
        full = self.loss if what == "loss" else self.gain
        share = np.log(np.maximum(reach, 1.0)) / np.log(max(self.factor, 1 + 1e-9))
        return 1 + (full - 1) * np.minimum(1.0, share)

    def least(self, reach: np.ndarray, d_over_n: np.ndarray) -> np.ndarray:
        """Half-width below which no interval of a gain is quoted at this reach and budget."""
        if not self.floor:
            return np.zeros(np.broadcast_shapes(np.shape(reach), np.shape(d_over_n)))
        ratios, halves = np.array(list(self.floor)), np.array(list(self.floor.values()))
        nearest = np.abs(np.log(ratios) - np.log(d_over_n)[..., None]).argmin(-1)
        return np.where(reach >= self.factor, halves[nearest], 0.0)

    def sentences(self) -> list[str]:
        """The calibration and what it assumes, in words."""
        if not self.floor:
            return ["There are too few sizes for a backtest: intervals are those of the model alone."]
        return [
            f"Intervals beyond the largest size are scaled by backtests: {self.gain:.2f} times for gains and "
            f"{self.loss:.2f} times for losses from a factor of {self.factor:.2g} in size on, in proportion to the log of "
            "the factor below it. This assumes that errors in standard errors stay at farther sizes what they were "
            f"there; it rests on {self.values} backtested values.",
            f"Beyond {self.factor:.2g} times the largest size no interval of a gain is quoted narrower than the "
            "backtest's at the nearest budget, ± "
            + ", ".join(f"{half:.4f} at {ratio:g} tokens a parameter" for ratio, half in self.floor.items())
            + ".",
        ]


@dataclass(frozen=True)
class Ensemble:
    """The forms with their weights, their copies, and the calibration; the one thing that predictions come from."""

    data: Observations
    members: tuple[tuple[Hierarchy, float], ...]
    copies: tuple[Copies, ...]
    backtests: tuple[Backtest, ...]
    calibration: Calibration

    @property
    def optimizers(self) -> tuple[str, ...]:
        return self.data.optimizers

    @property
    def weights(self) -> dict[str, float]:
        return {fit.form.name: weight for fit, weight in self.members}

    @property
    def noise(self) -> float:
        """Standard error of one run's loss, its common parts included, by the fits."""
        total = sum(w * np.sum(np.exp(2 * fit.phi[len(fit.form.groups) :])) for fit, w in self.members)
        return float(np.sqrt(total))

    def reach(self, n: np.ndarray | float) -> np.ndarray:
        """N over the largest measured size."""
        return np.asarray(n, float) / self.data.n.max()

    def losses(self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """(copies, *shape) final losses at N parameters and D tokens, without the noise of a run."""
        base = self._raw(self.optimizers[0], n, d)
        middle = np.median(base, 0)
        return middle + self.calibration.widen("loss", self.reach(n)) * (base - middle) - self.gains(optimizer, n, d)

    def gains(self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """(copies, *shape) losses of the baseline minus those of the optimizer, widened by the calibration."""
        base = self._raw(self.optimizers[0], n, d)
        if optimizer == self.optimizers[0]:
            return np.zeros_like(base)
        raw, reach = base - self._raw(optimizer, n, d), self.reach(n)
        middle, widen = np.median(raw, 0), self.calibration.widen("gain", reach)
        low, high = interval(raw)
        least = self.calibration.least(reach, np.asarray(d, float) / np.asarray(n, float))
        return middle + widen * np.maximum(1.0, least / np.maximum(widen * (high - low) / 2, 1e-12)) * (raw - middle)

    def speedups(self, optimizer: str, n: float, d: float) -> np.ndarray:
        """(copies,) tokens the baseline needs for the optimizer's loss, over D; inf where it never gets there."""
        gains, tokens, start = self.gains(optimizer, n, d), [], 0
        for copies in self.copies:
            mine = gains[start : start + len(copies)]
            tokens.append(copies.speedup(copies.losses(self.optimizers[0], n, d) - mine, n, d))
            start += len(copies)
        return np.concatenate(tokens)

    def _raw(self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        return np.concatenate([copies.losses(optimizer, n, d) for copies in self.copies])


def fit_ensemble(
    data: Observations, noise: Noise, *, copies: int = COPIES, seed: int = 0, forms: tuple[Form, ...] = FORMS
) -> Ensemble:
    """Fit every form to every prefix of the sizes, backtest, weigh, and draw copies; raises UserError for too few data."""
    _check(data)
    sizes, backtests = data.sizes, []
    weights = {form: 1 / len(forms) for form in forms}
    first = max(1, len(sizes) - BACKTESTS)
    for count in range(first, len(sizes)):
        known, ahead = data.where(data.n < sizes[count]), data.where(data.n == sizes[count])
        fits = {form: fit_hierarchy(known, form, noise) for form in forms}
        drawn = {form: draw(fit, copies // 2, seed) for form, fit in fits.items()}
        backtest = _backtest(ahead, sizes[count] / sizes[count - 1], count, fits, drawn, weights, noise)
        backtests.append(backtest)
        weights = _weights(backtest.scores, forms)
    kept = {form: weight for form, weight in weights.items() if weight >= LEAST_WEIGHT}
    total = sum(kept.values())
    members = tuple((fit_hierarchy(data, form, noise), weight / total) for form, weight in kept.items())
    drawn_last = tuple(draw(fit, max(8, round(copies * weight)), seed) for fit, weight in members)
    return Ensemble(data, members, drawn_last, tuple(backtests), calibrate(backtests))


def calibrate(backtests: list[Backtest]) -> Calibration:
    """λ and floors from the backtests."""
    widen, count = {}, 0
    for what in ("loss", "gain"):
        squares, count = 0.0, 0
        for test in backtests:
            z = test.standard_errors(what)
            # Optimizers of one size err together: a size counts for at most three values.
            worth = min(len(z), 3)
            squares, count = squares + worth * float(np.mean(z**2)) if len(z) else squares, count + worth
        widen[what] = float(np.sqrt((TRUST + squares) / (TRUST + count)))
    widen = {what: max(value, LEAST_SCALE[what]) for what, value in widen.items()}
    factor = max((test.factor for test in backtests), default=1.0)
    floor: dict[float, float] = {}
    if backtests:
        last = backtests[-1]
        low, high = interval(last.gain)
        half = widen["gain"] * (high - low) / 2
        ratios = np.array([float(f"{r:.2g}") for r in last.data.d / last.data.n])
        others = last.data.index > 0
        floor = {float(r): float(np.median(half[others & (ratios == r)])) for r in np.unique(ratios[others])}
    return Calibration(widen["loss"], widen["gain"], factor, floor, count)


def _check(data: Observations) -> None:
    if len(data.sizes) < 2 or len(np.unique(data.d)) < 3:
        raise UserError("a joint law needs two model sizes and three token budgets; run more regimes")
    if len(data.optimizers) < 2:
        raise UserError("a gain needs two optimizers; run another beside the baseline")
    for name, count in zip(data.optimizers, np.bincount(data.index, minlength=len(data.optimizers))):
        if count < 2:
            raise UserError(f"{name} has {count} results, the law needs 2; run more regimes or leave it out")


def _weights(scores: dict[str, float], forms: tuple[Form, ...]) -> dict[Form, float]:
    values = TEMPER * np.array([scores[form.name] for form in forms])
    values = np.exp(values - values.max())
    return dict(zip(forms, (values / values.sum()).tolist()))


def _backtest(
    ahead: Observations,
    factor: float,
    sizes: int,
    fits: dict[Form, Hierarchy],
    drawn: dict[Form, Copies],
    weights: dict[Form, float],
    noise: Noise,
) -> Backtest:
    names = [ahead.optimizers[k] for k in ahead.index]
    losses, scores, noises = {}, {}, {}
    for form, copies in drawn.items():
        losses[form] = np.stack([copies.losses(name, n, d) for name, n, d in zip(names, ahead.n, ahead.d)], 1)
        spreads = fits[form].phi[len(form.groups) :]
        noises[form] = sum(np.exp(2 * s) * m for s, m in zip(spreads, Problem(ahead, form, noise).noises))
        scores[form.name] = _log_density(ahead.loss, losses[form], noises[form])
    counts = {form: max(1, round(weights[form] * len(next(iter(drawn.values()))))) for form in drawn}
    mixed = np.concatenate([losses[form][:count] for form, count in counts.items() if weights[form] >= LEAST_WEIGHT])
    spread = sum(weights[form] * noises[form] for form in drawn)
    return Backtest(factor, sizes, ahead, mixed, _over_baseline(ahead, mixed), spread, scores)


def _log_density(observed: np.ndarray, copies: np.ndarray, noise: np.ndarray) -> float:
    """Gaussian density of held-out losses with the copies' mean and covariance, and the noise of the runs."""
    covariance = np.cov(copies.T) + noise
    error = observed - copies.mean(0)
    _, log_determinant = np.linalg.slogdet(2 * np.pi * covariance)
    return float(-0.5 * (log_determinant + error @ np.linalg.solve(covariance, error)))


def _base_row(data: Observations, row: int) -> int:
    same = (data.index == 0) & (data.n == data.n[row]) & (np.abs(np.log(data.d / data.d[row])) < 1e-3)
    rows = np.flatnonzero(same)
    return int(rows[0]) if len(rows) else -1


def _over_baseline(data: Observations, losses: np.ndarray) -> np.ndarray:
    """(copies, losses) → loss of the baseline in the same cell minus the loss; nan without one."""
    rows = np.array([_base_row(data, row) for row in range(len(data))])
    return np.where(rows >= 0, losses[:, rows] - losses, np.nan)


def _unit(size: int, at: int) -> np.ndarray:
    vector = np.zeros(size)
    vector[at] = 1.0
    return vector
