"""How well a law predicts what it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.fits.ensemble import Ensemble
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.scaling import Fit, fit_law


@dataclass(frozen=True)
class Prediction:
    """Predicted against observed losses of held-out runs."""

    data: Observations
    predicted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """90% interval of a new run: the law's spread and the noise of one loss"""

    @property
    def rmse(self) -> float:
        return float(np.sqrt(np.mean((self.predicted - self.data.loss) ** 2)))

    @property
    def coverage(self) -> float:
        """Share of held-out losses inside their interval."""
        return float(np.mean((self.data.loss >= self.low) & (self.data.loss <= self.high)))


def predict(fit: Fit, data: Observations, level: float = 0.9, seed: int = 0) -> Prediction:
    """Predict losses of other runs, with intervals from the fit's bootstrap copies."""
    names = [data.optimizers[k] for k in data.index]
    center = np.array([float(fit.predict(name, n, d)) for name, n, d in zip(names, data.n, data.d)])
    draws = np.stack([fit.predict_draws(name, n, d) for name, n, d in zip(names, data.n, data.d)], 1)
    draws = draws + fit.sigma * np.random.default_rng(seed).standard_normal(draws.shape)
    low, high = interval(draws, level)
    return Prediction(data, center, low, high)


def predict_by(ensemble: Ensemble, data: Observations, seed: int = 0) -> Prediction:
    """Predict losses of other runs by the hierarchical law, with the noise that it estimates for a run."""
    copies = np.stack(
        [ensemble.losses(data.optimizers[k], n, d) for k, n, d in zip(data.index, data.n, data.d)], axis=1
    )
    noise = ensemble.noise * np.random.default_rng(seed).standard_normal(copies.shape)
    low, high = interval(copies + noise)
    return Prediction(data, np.median(copies, 0), low, high)


def hold_out_largest(data: Observations, kind: str, noise: float = 0.0, resamples: int = 200) -> Prediction:
    """Fit without the largest size and predict it; raises UserError with fewer than three sizes."""
    if len(data.sizes) < 3:
        raise UserError("holding out the largest size needs three sizes; run one more model")
    largest = data.n == data.sizes[-1]
    return predict(fit_law(data.where(~largest), kind, noise=noise, resamples=resamples), data.where(largest))


def leave_one_out(fit: Fit) -> np.ndarray:
    """Prediction error of each loss by the fit to all the others; nan where the rest is too little to fit."""
    data, errors = fit.data, np.full(len(fit.data), np.nan)
    for i in range(len(data)):
        name = data.optimizers[data.index[i]]
        rest = data.where(np.arange(len(data)) != i)
        if fit.kind == "separate":
            rest = rest.of(name)
        try:
            other = fit_law(
                rest,
                fit.kind,
                form=fit.form,
                prior=fit.prior,
                noise=fit.sigma,
                start=fit.theta[fit.block(name)[0]],
                origin=fit.origin,
            )
        except UserError:
            continue
        errors[i] = float(other.predict(name, data.n[i], data.d[i])) - data.loss[i]
    return errors
