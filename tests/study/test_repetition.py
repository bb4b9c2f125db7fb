"""Repeated data: regimes of several epochs, their runs, and the data-constrained law on simulated losses of known truth."""

import math

import numpy as np
import pytest

from megatron_opt.errors import UserError
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.fits.noise import NoiseFloor
from megatron_opt.study.fits.observations import observations
from megatron_opt.study.fits.repetition import effective_tokens, repetition
from megatron_opt.study.report.repetition import repeated_data
from megatron_opt.study.runs import make_run
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study
from tests.study.conftest import STUDY
from tests.study.test_wall_clock import record

N = 50_000
R_STAR = {"adamw": 8.0, "lion": 1.5}


def law(name, tokens):
    return 2.0 + 40 * (tokens * (1.0 if name == "adamw" else 1.2)) ** -0.35


def simulated(noise, seed=0, seeds=3):
    """Unique tokens of 0.5x to 16x, and 2x and 8x in two, four and eight epochs."""
    rng, records = np.random.default_rng(seed), []
    regimes = [Regime("m", r) for r in (0.5, 1, 2, 4, 8, 16)]
    regimes += [Regime("m", r, e) for r in (2, 8) for e in (2, 4, 8)]
    for regime in regimes:
        for s in range(seeds):
            common = rng.normal(0, noise)
            for name, r_star in R_STAR.items():
                tokens = 20 * N * regime.ratio
                worth = effective_tokens(tokens / regime.epochs, regime.epochs, r_star)
                loss = float(law(name, worth)) + common + rng.normal(0, noise / 3)
                one = record(name, s, loss, 1.0, regime)
                records.append(one.__class__(**vars(one) | {"id": f"{name}{regime}{s}", "tokens": int(tokens)}))
    return Dataset("d", "adamw", records)


def test_effective_tokens_are_the_published_formula():
    r = 3.0
    assert effective_tokens(7.0, 1 + r, 15.39) == pytest.approx(7 + 7 * 15.39 * (1 - math.exp(-r / 15.39)))
    assert effective_tokens(7.0, 1, 2.0) == 7.0 and effective_tokens(7.0, 4, 1e9) == pytest.approx(28.0)


def test_the_worth_of_repetitions_is_found_with_an_interval_that_holds_it():
    held = []
    for seed in range(4):
        data = simulated(0.002, seed)
        found = repetition(data, observations(data), 0.002)
        held += [found.r_star[name].low <= truth <= found.r_star[name].high for name, truth in R_STAR.items()]
        assert found.r_star["lion"].high < found.r_star["adamw"].low
    assert sum(held) >= 7
    (cell,) = [c for c in found.cells if (c.optimizer, c.regime) == ("lion", Regime("m", 8, 8))]
    truth = effective_tokens(20 * N, 8, 1.5)
    assert cell.effective.low <= truth <= cell.effective.high and cell.unique == 20 * N and cell.tokens == 160 * N
    assert cell.cost.gain == pytest.approx(law("lion", 160 * N) - law("lion", truth), abs=0.004)
    assert cell.cost.verdict == "worse" and cell.cost.adjusted < 0.05
    assert cell.again.gain == pytest.approx(law("lion", 20 * N) - law("lion", truth), abs=0.004)
    assert (
        cell.again.verdict == "better" and next(c for c in found.cells if c.regime == Regime("m", 2, 8)).again is None
    )


def test_no_law_of_unique_tokens_is_fitted_to_repeated_ones():
    data = simulated(0.002)
    once = Dataset("d", "adamw", [r for r in data.records if r.regime.epochs == 1])
    a, b = observations(data), observations(once)
    assert len(a) == len(b) and (a.loss == b.loss).all()
    assert set(a.d) == {20 * N * r for r in (0.5, 1, 2, 4, 8, 16)}
    analysis = Analysis(data, a, NoiseFloor(0.002, 0), (1e6, (1.0,)), repetition=repetition(data, a, 0.002))
    section = repeated_data(analysis)
    assert len(section.tables[0].rows) == 12 and section.plots and section.tables[1].rows[0][0] == "adamw"
    assert section.tables[0].rows[0][:4] == ["m@2x-2ep", "adamw", "2e+06", "1e+06"]
    assert not repeated_data(Analysis(once, b, NoiseFloor(0.002, 0), (1e6, (1.0,)))).tables
    few = Dataset("d", "adamw", [r for r in data.records if r.regime.epochs > 1 or r.regime.ratio == 2])
    found = repetition(few, observations(few), 0.002)
    assert not found.r_star and "three budgets" in found.notes[0] and found.cells[0].effective is None


def test_regimes_say_their_epochs():
    assert str(Regime("m", 4, 2)) == "m@4x-2ep" and Regime.parse("m@4x-2ep") == Regime("m", 4, 2)
    assert str(Regime("m", 4)) == "m@4x" and Regime.parse("m@4x") == Regime.parse("m@4")
    for text in ("m@4x-2", "m@4x-0ep", "m@4x-ep", "m@4x-1.5ep", "m@x"):
        with pytest.raises(UserError, match="is not a regime"):
            Regime.parse(text)


def test_a_repeated_run_is_another_run_of_as_many_tokens_and_whole_epochs(make_study, tmp_path):
    study = read_study(make_study(STUDY + "ratios: [1, 4]\nepochs: [1, 3]\n"))
    assert list(map(str, study.regimes())) == ["tiny@1x", "tiny@1x-3ep", "tiny@4x", "tiny@4x-3ep"]
    plain, repeated = (
        make_run(study, "adamw", Regime("tiny", 4, e), {"lr": 0.004, "batch_size": 4}, 1) for e in (1, 3)
    )
    assert plain.id != repeated.id and "train-epochs" not in plain.config["flags"] and "epochs" not in plain.config
    assert plain.surroundings["train-epochs"] == 1
    alone = read_study(make_study(STUDY + "ratios: [1, 4]\n", "alone.yaml"))
    same = make_run(alone, "adamw", Regime("tiny", 4), {"lr": 0.004, "batch_size": 4}, 1)
    assert same.id == plain.id and "train-epochs" not in same.surroundings
    flags = repeated.config["flags"]
    assert flags["train-epochs"] == 3 and flags["train-iters"] % 3 == 0
    assert 0 <= plain.tokens - repeated.tokens < 3 * 4 * 64
    with Store(tmp_path / "s.sqlite", create=True) as store:
        store.plan("grid", [plain, repeated], {"tiny": 100})
        store.finish(repeated.id, {"final_valid_loss": 3.0}, None)
        (found,) = from_store(store).finished
    assert found.regime == Regime("tiny", 4, 3) and found.unique_tokens * 3 == found.tokens


@pytest.mark.parametrize(("more", "said"), [
    ("epochs: [1, 1]\n", "18: `epochs:` must be different whole numbers"),
    ("epochs: [1.5]\n", "18: `epochs:` must be different whole numbers"),
    ("epochs: [0]\n", "18: `epochs:` has 0; every value must be greater than 0"),
    ("epoch: [2]\n", "18: unknown key `epoch` in the study file; did you mean `epochs`"),
    ("phases: [grid, {kind: predict, regimes: [tiny@4x-2ep], registered: true}]\n", "18: `registered: true` is for unique"),
])  # fmt: skip
def test_mistakes_in_the_file(make_study, more, said):
    with pytest.raises(UserError, match=said):
        read_study(make_study(STUDY + more))
