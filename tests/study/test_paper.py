"""The published study: its numbers, recomputed; its largest size, predicted."""

import json
import re

import numpy as np
import pytest

from megatron_opt.study import cli
from megatron_opt.study.fits.ensemble import fit_ensemble
from megatron_opt.study.fits.gain_law import check_gain_law
from megatron_opt.study.fits.hierarchy import Noise
from megatron_opt.study.fits.observations import observations
from megatron_opt.study.fits.scaling import KINDS, fit_law
from megatron_opt.study.fits.speedups import speedups
from megatron_opt.study.fits.statement import crossing
from megatron_opt.study.fits.statement import predict as predict_at
from megatron_opt.study.fits.validation import predict
from megatron_opt.study.paper_data import paper_dataset

# Recomputed token speedups over AdamW; rows: 130M, 300M, 520M at 1/2/4/8x.
TABLE = """
muon      1.42/1.33/1.32/1.41 1.29/1.22/1.20/1.23 1.30/1.23/1.23/1.25
soap      1.27/1.28/1.32/1.39 1.23/1.18/1.15/1.21 1.21/1.20/1.23/1.27
kron      1.22/1.15/1.21/1.37 1.15/1.14/1.14/1.19 1.17/1.14/1.20/1.25
scion     1.33/1.24/1.22/1.25 1.23/1.13/1.10/1.08 1.21/1.16/1.11/1.16
nadamw    .99/1.10/1.02/1.18 1.10/1.05/1.05/1.05 1.09/1.09/1.08/1.10
mars      .97/1.09/1.01/1.21 1.11/1.08/1.00/1.06 1.04/1.09/1.09/1.13
cautious  .99/1.05/.95/1.16 1.03/1.01/1.01/1.02 1.03/1.05/1.05/1.04
lion      .91/.99/.93/1.14 .97/.97/.94/.98 .97/.94/.94/.96
adam_mini .94/.95/.94/.96 .95/.91/.91/.90 .95/.95/.96/1.01
"""


def test_speedups_agree_with_the_published_table():
    data = observations(paper_dataset())
    found = {(s.optimizer, s.n, round(s.d / s.n / 20)): s for s in speedups(data, 2e-3, resamples=20)}
    sizes = dict(zip((0, 1, 2), data.sizes))
    for row in TABLE.strip().splitlines():
        name, *numbers = re.split(r"[\s/]+", row.strip())
        for i, expected in enumerate(map(float, numbers)):
            value = found[name, sizes[i // 4], 2 ** (i % 4)]
            assert value.value == pytest.approx(expected, abs=0.02), (name, i)
            assert value.low < value.value < value.high and value.method == "size"


def test_the_520m_losses_are_predicted_from_the_smaller_sizes():
    data = observations(paper_dataset(), ["adamw", "muon", "soap"])
    largest = data.n == data.sizes[-1]
    errors = {}
    for kind in KINDS:
        fit = fit_law(data.where(~largest), kind, noise=2e-3, resamples=100)
        found = predict(fit, data.where(largest))
        errors[kind] = found.rmse
        assert found.coverage >= 0.75
    assert np.sum(largest) == 12
    assert min(errors.values()) <= 0.012


@pytest.fixture(scope="module")
def law():
    """The hierarchical law of four optimizers at all sizes."""
    return fit_ensemble(observations(paper_dataset(), ["adamw", "muon", "soap", "kron"]), Noise(2e-3))


def test_the_backtest_holds_within_ten_thousandths_and_covers_the_gains(law):
    test = law.backtests[-1]
    assert test.sizes == 2 and len(test.data) == 16
    assert np.sqrt(np.mean(test.error**2)) <= 0.010
    low, high = test.intervals("gain")
    others = test.data.index > 0
    assert np.sum(((low <= test.observed_gain) & (test.observed_gain <= high))[others]) >= 10
    simple = check_gain_law(law.backtests, law.data)
    error = simple.predicted - test.observed_gain[simple.rows]
    assert np.mean(test.gain_error[simple.rows] ** 2) < np.mean(error**2)


def test_gains_decay_and_what_is_said_at_1200m_agrees_with_the_publication(law):
    # The publication, none of whose 1.2B losses are here, reads 1.1 to 1.2 for matrix methods.
    for name in ("muon", "soap"):
        near, far = predict_at(law, name, 1.2e9, 2.4e10), predict_at(law, name, 7e9, 1.4e11)
        assert 1.08 < near.speedup.value < 1.25 and near.speedup.low < 1.15
        assert far.gain.value < near.gain.value < 0.03 and far.gain.low < 0.005
        assert crossing(law, name, 1.0, 7e9, 20.0).decay.low > 0.2


def test_no_sign_is_claimed_that_separate_laws_invent():
    for other in ("muon", "adam_mini"):
        law = fit_ensemble(observations(paper_dataset(), ["adamw", other]), Noise(2e-3))
        found = predict_at(law, other, 7e9, 1.4e11)
        assert found.gain.low < 0.005 and found.gain.value < 0.015  # separate laws: .064 (.014 to .108), and .042


def test_data_equivalence_beyond_the_baselines_budgets_is_marked_and_wider():
    data = observations(paper_dataset(), ["adamw", "muon"])
    found = speedups(data, 2e-3, resamples=40)
    beyond = [s for s in found if s.beyond]
    assert {round(s.d / s.n / 20) for s in beyond} == {8}
    assert all(s.value * s.d > data.d[data.n == s.n].max() for s in beyond)
    inside = [s.high - s.low for s in found if round(s.d / s.n / 20) == 4]
    assert min(s.high - s.low for s in beyond) > np.median(inside)


def test_the_laws_of_all_sizes_fit_to_a_few_thousandths():
    data = observations(paper_dataset(), ["adamw", "muon", "soap"])
    for kind in KINDS:
        fit = fit_law(data, kind)
        assert fit.form == "coupled"
        assert np.sqrt(np.mean(fit.residuals**2)) < 4e-3


def test_ablations_show_the_cliff():
    dataset = paper_dataset()
    cell = [r for r in dataset.records if r.optimizer == "adamw" and str(r.regime) == "130m@2x"]
    by_lr = {r.hyper["lr"]: r for r in cell if r.id.rpartition("-")[2].startswith(("lr", "2x"))}
    assert by_lr[0.032].status == "diverged" and by_lr[0.016].loss == 3.419
    assert dataset.best()["adamw", cell[0].regime].loss == 3.408


def test_demo_paper_fits_and_reports_without_training(tmp_path, capsys):
    code = cli.main(["demo-paper", "--output", str(tmp_path / "out"), "--optimizers", "muon", "--resamples", "30"], "s")
    assert code == 0
    shown = capsys.readouterr().out
    assert "muon's gain over adamw at 1x falls with size" in shown and "report: " in shown
    assert "At 7B parameters nothing was run" in shown and "no interval of a gain is quoted narrower" in shown
    fits = json.loads((tmp_path / "out" / "fits.json").read_text())
    assert fits["laws"]["shared"]["optimizers"] == ["adamw", "muon"]
    assert {round(e["d"] / e["n"] / 20) for e in fits["extrapolations"]} == {1, 2, 4, 8, 16}
    page = (tmp_path / "out" / "index.html").read_text()
    assert fits["prediction"]["words"][0] in page.replace("&#x27;", "'")
    assert page.index("What can be said</h2>") < page.index("Results</h2>")
    assert {row["optimizer"] for row in fits["backtests"]} == {"adamw", "muon"}
    assert "arXiv 2509.02046" in page and "Extrapolation to 7e+09 parameters" in page


def test_hyperball_saves_tokens_and_keeps_its_learning_rate_longer(tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["demo-paper", "--data", "hyperball", "--output", str(output), "--resamples", "30"], "s") == 0
    assert "No shared law: a joint law needs two model sizes" in capsys.readouterr().out
    fits = json.loads((output / "fits.json").read_text())
    values = {round(item["d"] / 1e9): item["value"] for item in fits["speedups"]}
    assert sorted(values) == [1, 2, 4, 6, 8, 12, 16]
    # 16B tokens: 3.2453 against Muon's 3.2605, which Muon reaches beyond 16B only.
    assert all(value > 1 for value in values.values()) and values[16] > 1.1
    laws = {law["optimizer"]: law for law in fits["hyperparameter_laws"]}
    assert laws["muonh"]["theta"][2] < laws["muon"]["theta"][2]
    assert "arXiv 2606.16899" in (output / "index.html").read_text()
