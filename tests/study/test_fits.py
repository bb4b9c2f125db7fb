"""Fits against laws of known truth: recovery, gradients, coverage, noise, crossings."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.errors import UserError
from megatron_opt.study.fits.hyper_laws import fit_hyper_law
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.law import law, tokens_for
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.power_law import fit_power_law
from megatron_opt.study.fits.scaling import fit_law
from megatron_opt.study.fits.validation import leave_one_out, predict

NAMES = ("adamw", "muon", "soap")
SIZES, RATIOS = np.array([134e6, 302e6, 537e6]), np.array([1.0, 2.0, 4.0, 8.0])
N0, D0 = 3e8, 1.2e10


def truth(kappa=1.0, rho=((1.02, 1.35), (1.05, 1.25))):
    factors = [math.log(value) for pair in rho for value in pair]
    return np.array([math.log(1.9), math.log(0.55), 0.3, math.log(0.4), 0.3, math.log(kappa), *factors])


def cells(sizes, ratios=RATIOS, optimizers=(0, 1, 2)):
    return [a.ravel() for a in np.meshgrid(np.array(optimizers), sizes, ratios, indexing="ij")]


def draw(theta, sizes, noise=0.0, seed=0, ratios=RATIOS):
    index, n, ratio = cells(sizes, ratios)
    d = 20 * ratio * n
    loss = law(theta, index, np.log(n / N0), np.log(d / D0))[0]
    return Observations(NAMES, index, n, d, loss + noise * np.random.default_rng(seed).standard_normal(len(loss)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-0.5, 0.5), min_size=10, max_size=10), st.floats(-1.5, 0.0))
def test_the_jacobian_of_the_law_is_its_derivative(offsets, log_kappa):
    x = truth() + np.array(offsets)
    x[5] = log_kappa
    index, log_n, log_d = (
        np.array([0, 1, 2, 1]),
        np.array([0.3, -0.2, 0.5, 1.0]),
        np.array([0.1, 0.4, -0.8, -0.3]),
    )
    analytic = law(x, index, log_n, log_d)[1]
    step = 1e-6
    numeric = np.stack(
        [
            (law(x + step * unit, index, log_n, log_d)[0] - law(x - step * unit, index, log_n, log_d)[0]) / (2 * step)
            for unit in np.eye(10)
        ],
        1,
    )
    np.testing.assert_allclose(analytic, numeric, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.3, 1.0))
def test_tokens_for_a_loss_invert_the_law(k, log_n, log_d, kappa):
    theta = truth(kappa)
    loss = law(theta, np.array([k]), np.array([log_n]), np.array([log_d]))[0]
    assert tokens_for(theta, k, loss, np.array([log_n]))[0] == pytest.approx(log_d, abs=1e-7)
    unreachable = np.array([math.exp(theta[0]) - 0.01])
    assert tokens_for(theta, k, unreachable, np.array([log_n]))[0] == np.inf


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("kappa", [1.0, 0.45])
def test_a_law_without_noise_is_recovered(kind, kappa):
    data = draw(truth(kappa), SIZES)
    fit = fit_law(data, kind)
    assert fit.form == ("additive" if kappa == 1.0 else "coupled")
    assert np.abs(fit.residuals).max() < 1e-3
    ahead = draw(truth(kappa), np.array([1.2e9]))
    for k, n, d, loss in zip(ahead.index, ahead.n, ahead.d, ahead.loss):
        assert float(fit.predict(NAMES[k], n, d)) == pytest.approx(loss, abs=4e-3)
    if kind == "shared":
        assert fit.efficiency("muon")[1] == pytest.approx(1.35, abs=0.02)
        assert fit.efficiency("adamw") == (1.0, 1.0)


def test_a_law_with_fewer_results_than_parameters_is_refused_and_left_out_ones_are_not_known():
    n, d = np.array([1e4, 4e4, 1e4, 4e4, 4e4]), np.array([1e4, 4e4, 1.1e4, 4.1e4, 8e4])
    losses, index = np.array([3.0, 1.8, 2.9, 1.7, 1.6]), np.array([0, 0, 1, 1, 0])
    data = Observations(("adamw", "lion"), index, n, d, losses)
    assert np.isnan(leave_one_out(fit_law(data, "shared"))).all()
    with pytest.raises(UserError, match="7 results and priors do not determine the 8 parameters"):
        fit_law(data.where(np.arange(5) < 4), "shared")


@pytest.mark.slow
@pytest.mark.parametrize("kind,kappa", [("shared", 1.0), ("shared", 0.5)])
def test_intervals_cover_the_truth_at_their_nominal_rate(kind, kappa):
    """200 draws: held-out losses, the loss and the gain at 7B; three standard errors of a rate of 0.9
    are 0.064.
    """
    theta = truth(kappa)
    origin = np.log([7e9 / N0, 7e9 / N0]), np.log([1.4e11 / D0, 1.4e11 / D0])
    base, muon = law(theta, np.array([0, 1]), *origin)[0]
    inside = {"held-out losses": [], "loss at 7B": [], "gain at 7B": []}
    form = "additive" if kappa == 1.0 else "coupled"
    for seed in range(200):
        fit = fit_law(draw(theta, SIZES, 2e-3, seed), kind, form=form, resamples=40, seed=seed)
        ahead = draw(theta, np.array([1.2e9]), 2e-3, 10_000 + seed)
        inside["held-out losses"].append(predict(fit, ahead, seed=seed).coverage)
        draws = {name: fit.predict_draws(name, 7e9, 1.4e11) for name in ("adamw", "muon")}
        for what, copies, value in (
            ("loss at 7B", draws["adamw"], base),
            ("gain at 7B", draws["adamw"] - draws["muon"], base - muon),
        ):
            low, high = interval(copies)
            inside[what].append(low <= value <= high)
    rates = {what: float(np.mean(found)) for what, found in inside.items()}
    assert all(0.836 <= rate <= 0.964 for rate in rates.values()), rates


def test_one_wild_loss_does_not_move_the_law():
    data = draw(truth(), SIZES, 1e-3)
    spoiled = data.loss.copy()
    spoiled[5] += 0.3
    clean, robust = fit_law(data, "shared"), fit_law(replace(data, loss=spoiled), "shared", form="additive")
    for name in NAMES:
        assert float(robust.predict(name, 5.4e8, 4e10)) == pytest.approx(
            float(clean.predict(name, 5.4e8, 4e10)), abs=0.03
        )


def test_too_few_data_are_refused_and_a_prior_that_decides_is_said():
    one_size = draw(truth(), SIZES[:1])
    with pytest.raises(UserError, match="two model sizes"):
        fit_law(one_size)
    two = fit_law(draw(truth(), SIZES[:2], 2e-3), "separate", resamples=50)
    assert any("set by the prior" in sentence for sentence in two.diagnosis())
    spread = np.array([1e7, 1e8, 1e9, 1e10])
    assert not any("prior rather" in s for s in fit_law(draw(truth(), spread, 1e-3), resamples=50).diagnosis())


def test_leave_one_out_errors_have_the_size_of_the_noise():
    fit = fit_law(draw(truth(), SIZES, 2e-3, 3), "shared")
    errors = leave_one_out(fit)
    assert 1e-3 < np.sqrt(np.mean(errors**2)) < 4e-3


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 1.0), st.floats(0.1, 0.9), st.floats(2.0, 4.0))
def test_the_power_law_of_four_budgets_is_recovered_and_speeds_are_exact(alpha, exponent, beta):
    d = 1e9 * RATIOS
    fit = fit_power_law(d, alpha * RATIOS**-exponent + beta)
    np.testing.assert_allclose(fit.loss(d), alpha * RATIOS**-exponent + beta, atol=1e-7)
    assert float(fit.speedup(alpha * 2.6**-exponent + beta, 2e9)) == pytest.approx(1.3, rel=1e-3)
    assert fit.tokens(fit.beta - 0.1) == np.inf


def test_hyperparameter_laws_recover_exponents_and_say_how_sure_they_are():
    _, n, ratio = cells(SIZES, optimizers=(0,))
    d = 20 * ratio * n
    value = 0.01 * (n / 3e8) ** -0.4 * (d / 1e10) ** -0.1
    fit = fit_hyper_law("adamw", "lr", n, d, value)
    assert float(fit.predict(1e9, 2e10)) == pytest.approx(0.01 * (1 / 0.3) ** -0.4 * 2**-0.1, rel=0.05)
    low, high = fit.interval(1e9, 2e10)
    assert low < float(fit.predict(1e9, 2e10)) < high
    with pytest.raises(UserError, match="three regimes"):
        fit_hyper_law("adamw", "lr", n[:2], d[:2], value[:2])
