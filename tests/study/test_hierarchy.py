"""The hierarchical law: derivatives, limits, pairing, wild runs, coverage on known truths."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_opt.errors import UserError
from megatron_opt.study.fits.ensemble import fit_ensemble
from megatron_opt.study.fits.forms import FORMS, Form
from megatron_opt.study.fits.hierarchy import Linear, Noise, Problem, fit_hierarchy
from megatron_opt.study.fits.next_runs import narrowing, next_runs
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.posterior import draw
from megatron_opt.study.fits.statement import crossing, predict, state

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from study_coverage import N0, WORLDS, World, one_draw, sample, table, world

SHORT = tuple(Form("coupled", gain) for gain in ("exponents", "power", "log-linear"))


def study(name="shared", seed=0):
    rng = np.random.default_rng(seed)
    truth = world(name, rng)
    return truth, sample(truth, rng)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_derivatives_are_exact(form):
    rng = np.random.default_rng(1)
    mean, _ = form.prior(3.0, 0.15)
    core, own = mean + 0.1 * rng.normal(size=len(mean)), 0.05 * rng.normal(size=(form.own_size, 4))
    n, d = rng.normal(size=4), rng.normal(size=4)
    loss, by_core, by_own = form.jacobian(core, own, n, d)
    np.testing.assert_allclose(loss, form.loss(core[:, None], own, n, d), rtol=1e-13)
    for j, step in enumerate(1e-6 * np.eye(form.core_size)):
        numeric = (form.loss((core + step)[:, None], own, n, d) - form.loss((core - step)[:, None], own, n, d)) / 2e-6
        np.testing.assert_allclose(by_core[:, j], numeric, atol=1e-8)
    for j, step in enumerate(1e-6 * np.eye(form.own_size)[:, :, None]):
        numeric = (form.loss(core[:, None], own + step, n, d) - form.loss(core[:, None], own - step, n, d)) / 2e-6
        np.testing.assert_allclose(by_own[:, j], numeric, atol=1e-8)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_tokens_invert_the_level(form):
    mean, _ = form.prior(3.0, 0.15)
    for n, d in ((0.5, -1.0), (-1.0, 2.0)):
        loss = form.loss(mean, np.zeros(form.own_size), n, d)
        assert float(form.tokens(mean, loss, n)) == pytest.approx(d, abs=1e-9)
    assert float(form.tokens(mean, 0.1, 0.0)) == np.inf


def test_the_gradient_of_the_marginal_likelihood_is_its_derivative():
    problem = Problem(study()[1], FORMS[0], Noise(2e-3))
    linear = Linear(problem, problem.mean, np.zeros(36))
    phi = problem.centers + 0.1
    gradient = linear.negative(phi)[1]
    numeric = [(linear.negative(phi + h)[0] - linear.negative(phi - h)[0]) / 2e-5 for h in 1e-5 * np.eye(len(phi))]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-3)


def test_the_spread_of_exponents_is_small_where_they_are_shared_and_large_where_they_are_not():
    form, spreads = FORMS[0], {}
    for name in ("shared", "separate"):
        found = [fit_hierarchy(study(name, seed)[1], form, Noise(2e-3)).spreads["exponents"] for seed in range(6)]
        spreads[name] = np.exp(np.mean(np.log(found)))
    assert spreads["separate"] > 1.3 * spreads["shared"]


def test_a_noise_common_to_a_cell_cancels_in_gains():
    _, data = study()
    rng = np.random.default_rng(5)
    cells = rng.normal(0, 0.01, (3, 4))
    size, budget = np.searchsorted(data.sizes, data.n), np.round(np.log2(data.d / data.n / 20)).astype(int)
    fits = [
        fit_hierarchy(one, FORMS[2], Noise(2e-3)) for one in (data, replace(data, loss=data.loss + cells[size, budget]))
    ]
    widths, gains = [], []
    for fit in fits:
        copies = draw(fit, 200)
        gain = copies.losses("adamw", 1.2e9, 2.4e10) - copies.losses("muon", 1.2e9, 2.4e10)
        widths.append(gain.std())
        gains.append(gain.mean())
    assert fits[1].spreads["noise of cell"] > 4 * fits[0].spreads["noise of cell"]
    assert fits[1].spreads["noise of run"] < 0.004  # the cell's noise is not taken for that of a run
    assert widths[1] < 2.0 * widths[0] and abs(gains[1] - gains[0]) < 2 * widths[0]


def test_one_wild_run_does_not_move_the_gain():
    _, data = study()
    spoiled = data.loss.copy()
    spoiled[14] += 0.1
    clean, wild = (fit_hierarchy(one, FORMS[2], Noise(2e-3)) for one in (data, replace(data, loss=spoiled)))
    assert wild.wild.tolist() == (np.arange(36) == 14).tolist() and not clean.wild.any()
    gains = [
        np.median((c := draw(f, 200)).losses("adamw", 1e9, 4e10) - c.losses("muon", 1e9, 4e10)) for f in (clean, wild)
    ]
    assert abs(gains[0] - gains[1]) < 0.003


def test_seeds_in_common_are_known_to_the_noise():
    _, data = study()
    seeds = tuple(frozenset({1, 2}) if k == 0 else frozenset({1}) for k in data.index)
    shared = replace(data, seeds=seeds).shared_seeds()
    assert shared[0, 0] == 0.5 and shared[12, 12] == 1.0 and shared[0, 12] == 0.5
    assert replace(data, seeds=seeds).where(data.index == 0).counts.tolist() == [2.0] * 12


@pytest.fixture(scope="module")
def ensemble():
    """A study whose gain decays as N^−0.5 to zero nowhere."""
    truth = World(
        lambda k, n, d: 1.9 + 0.4 * (n / N0) ** -0.3 + 0.5 * (d / 1.6e10) ** -0.28 - k * 0.02 * (n / N0) ** -0.5,
        5e-4,
        0,
        0,
    )
    return fit_ensemble(sample(truth, np.random.default_rng(0)), Noise(5e-4), forms=SHORT)


def test_a_decaying_gain_is_seen_with_its_rate(ensemble):
    found = crossing(ensemble, "soap", 1.0, 7e9, 20.0)
    assert found.decay.low < 0.5 < found.decay.high and found.decay.high - found.decay.low < 0.15
    at = predict(ensemble, "soap", 7e9, 1.4e11)
    assert at.gain.low < 0.04 * (7e9 / N0) ** -0.5 < at.gain.high and at.chance > 0.9


def test_the_statement_says_what_is_and_is_not_known(ensemble):
    said = state(ensemble, 7e9, (1.0, 8.0))
    words = " ".join(said.sentences())
    assert "nothing was run" in words and "13.0 times fewer" in words and "P(gain > 0)" in words
    inside = state(ensemble, 3e8, (1.0,))
    assert "inside the range" in inside.sentences()[0] and said.at("muon", 8.0).d == 8 * 20 * 7e9
    assert said.at("adamw", 1.0).gain.value == 0 and said.at("adamw", 1.0).speedup.value == 1


def test_beyond_the_backtests_factor_no_interval_is_below_the_backtests(ensemble):
    calibration = ensemble.calibration
    assert calibration.factor == pytest.approx(2.25)
    for ratio in (1.0, 8.0):
        gain = predict(ensemble, "muon", 7e9, 20 * ratio * 7e9).gain
        assert (gain.high - gain.low) / 2 >= 0.98 * float(calibration.least(13.0, 20.0 * ratio))
    assert float(calibration.widen("gain", 1.0)) == 1.0 and float(calibration.widen("gain", 9.0)) == calibration.gain


def test_a_further_run_narrows_by_what_is_said(ensemble):
    runs = next_runs(ensemble, "muon", 7e9, 1.4e11, hours=lambda name, n, d: n * d)
    assert runs[0].shrinkage > runs[-1].shrinkage >= 0 and max(run.n for run in runs) > ensemble.data.n.max()
    assert {run.optimizer for run in runs} == {"adamw", "muon", "adamw and muon"}
    share = {(run.optimizer, run.n, run.ratio): run for run in runs}
    largest, most = max(run.n for run in runs), 1.0
    pair, alone = share["adamw and muon", largest, most], share["muon", largest, most]
    assert pair.shrinkage > 2 * alone.shrinkage, "with a seed in common, the noise of the cell cancels"
    assert pair.hours == pytest.approx(2 * alone.hours) and pair.width < alone.width
    smallest = share["adamw and muon", float(ensemble.data.n.min()), most]
    assert pair.shrinkage > 5 * smallest.shrinkage, "a repeated small run tells little of 7B"


def test_narrowing_is_that_of_the_law_with_the_runs_added(ensemble):
    """One form: the posterior of the gain with two more losses, by the law itself at the same parameters and spreads."""
    fit, copies = ensemble.members[0][0], ensemble.copies[0]
    alone = replace(ensemble, members=((fit, 1.0),), copies=(copies,))
    data, n, d, target = ensemble.data, 2e9, 4e10, (7e9, 1.4e11)
    more = Observations(
        data.optimizers,
        np.append(data.index, [0, 1]),
        np.append(data.n, [n, n]),
        np.append(data.d, [d, d]),
        np.append(data.loss, [2.9, 2.88]),
    )
    gain = fit.gradient("adamw", *target) - fit.gradient("muon", *target)

    def spread(known, extra):
        problem = Problem(known, fit.form, fit.problem.noise, fit.problem.origin)
        covariance = Linear(problem, fit.x, extra).posterior(fit.phi)[1]
        return np.sqrt(gain @ covariance @ gain)

    expected = 1 - spread(more, np.append(fit.extra, [0, 0])) / spread(data, fit.extra)
    found = narrowing(alone, "muon", target, [[("adamw", n, d), ("muon", n, d)]])
    assert found[0] == pytest.approx(expected, rel=1e-6) and expected > 0.05


def test_too_few_data_are_refused():
    _, data = study()
    with pytest.raises(UserError, match="two model sizes"):
        fit_ensemble(data.where(data.n == data.sizes[0]), Noise(2e-3))
    with pytest.raises(UserError, match="soap has 1 results"):
        fit_ensemble(data.where((data.index < 2) | (np.arange(36) == 24)), Noise(2e-3))
    with pytest.raises(UserError, match="two optimizers"):
        fit_ensemble(data.of("adamw"), Noise(2e-3))


def test_intervals_cover_in_four_worlds_in_short():
    """Two studies a world, three forms; the full form is benchmarks/study_coverage.py."""
    rows = [row for name in WORLDS for seed in range(2) for row in one_draw(name, seed, 200, SHORT)]
    for what, count in (("loss", 96), ("gain", 64), ("speedup", 64)):
        inside = [row["inside"] for row in rows if row["what"] == what]
        assert len(inside) == count and np.mean(inside) > 0.75, what
    assert table(rows).count("\n") == 17


def test_losses_far_from_any_law_are_fitted_all_the_same():
    """Of a study of 58 to 526 steps, whose baseline misses every form by .3: Gauss–Newton went where squares overflow."""
    sizes = np.repeat([9984.0, 22464.0], 2)
    losses = [4.7871, 4.0723, 4.6881, 3.7644, 4.4179, 3.9745, 4.0308, 3.5530, 4.7428, 3.9302, 4.0866, 3.4982]
    data = Observations(
        ("adamw", "muon", "soap"),
        np.repeat([0, 1, 2], 4),
        np.tile(sizes, 3),
        np.tile([5.94e4, 2.4e5, 1.34e5, 5.39e5], 3),
        np.array(losses),
    )
    for gain in ("exponents", "irreducible"):
        fit = fit_hierarchy(data, Form("additive", gain), Noise(0.002))
        assert np.isfinite(draw(fit, 50, 0).losses("soap", 4e4, 2.4e5)).all()
