"""Coordinate descent on objectives with a known optimum: path, run count, noise, equal effort, verdicts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.study.descent import beyond, descend, refine
from megatron_opt.study.phases import Planner
from megatron_opt.study.sensitivity import classify
from megatron_opt.study.spec import Regime
from megatron_opt.study.study_file import read_study

GRID = {"lr": (0.001, 0.002, 0.004, 0.008, 0.016), "beta1": (0.8, 0.9, 0.95), "warmup": (100, 200, 400)}
START = {"lr": 0.001, "beta1": 0.8, "warmup": 100, "batch_size": 8}


def bowl(point, lr=0.004, beta1=0.95, warmup=200, cliff=math.inf):
    if point["lr"] >= cliff:
        return math.inf
    loss = 3 + 0.05 * math.log2(point["lr"] / lr) ** 2
    return loss + 4 * (point["beta1"] - beta1) ** 2 + 0.02 * math.log2(point["warmup"] / warmup) ** 2


def test_it_finds_the_optimum_in_the_expected_number_of_runs_and_tells_the_way():
    asked = []

    def evaluate(point):
        asked.append(dict(point))
        return bowl(point)

    search = descend(START, GRID, evaluate, 3e-3)
    assert search.complete and search.point == START | {"lr": 0.004, "beta1": 0.95, "warmup": 200}
    # 1 start + 4 + 3 + 2 new points on the way, beta1 widened by one; a closing pass whose sweeps of lr and beta1 add 4 + 3.
    assert len(search.wanted) == 17
    assert [s.widened for s in search.sweeps] == [0, 1, 0, 0, 1] and search.grid["beta1"][-1] == 0.975
    assert [(s.coordinate, s.best, s.adopted) for s in search.sweeps] == [
        ("lr", 0.004, True),
        ("beta1", 0.95, True),
        ("warmup", 200, True),
        ("lr", 0.004, False),
        ("beta1", 0.95, False),
    ]
    assert search.sweeps[0].gain == pytest.approx(0.05 * 4)
    assert len({str(p) for p in asked}) == len(search.wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(GRID["lr"]),
    st.sampled_from(GRID["beta1"]),
    st.sampled_from(GRID["warmup"]),
    st.integers(0, 10_000),
)
def test_with_noise_below_the_threshold_it_still_finds_the_optimum(lr, beta1, warmup, seed):
    def evaluate(point):
        key = [seed, round(point["lr"] * 1e6), round(point["beta1"] * 100), point["warmup"]]
        return bowl(point, lr, beta1, warmup) + 1e-3 * np.random.default_rng(key).uniform(-1, 1)

    search = descend(START, GRID, evaluate, 3e-3)
    assert search.complete
    assert (search.point["lr"], search.point["beta1"], search.point["warmup"]) == (lr, beta1, warmup)


def test_a_gain_below_the_threshold_moves_nothing():
    search = descend(START | {"lr": 0.004}, {"lr": (0.004, 0.008)}, lambda p: 3.0 - 0.002 * (p["lr"] > 0.005), 3e-3)
    assert search.complete and search.point["lr"] == 0.004
    assert [(s.best, s.adopted) for s in search.sweeps] == [(0.008, False)]


def test_replaying_with_growing_knowledge_follows_one_path():
    known = {}
    lengths = []
    for _ in range(100):
        search = descend(START, GRID, lambda p: known.get(str(p)), 3e-3)
        if search.complete:
            break
        fresh = [p for p in search.wanted if str(p) not in known]
        assert fresh, "an incomplete search must say what it wants"
        known[str(fresh[-1])] = bowl(fresh[-1])
        lengths.append(len(search.wanted))
    assert search.complete and len(known) == 17 and lengths == sorted(lengths)


def test_a_cliff_beside_the_optimum_is_stepped_back_from_and_a_diverged_start_left():
    search = descend(START | {"lr": 0.016}, GRID, lambda p: bowl(p, cliff=0.008), 3e-3)
    assert search.point["lr"] == 0.004
    assert descend(START, {"lr": (0.001, 0.002)}, lambda p: math.inf, 3e-3).complete


@pytest.mark.parametrize("best", [0.0001, 0.07, 0.13])
def test_a_grid_is_widened_until_the_optimum_is_inside(best):
    search = descend(START, {"lr": GRID["lr"]}, lambda p: bowl(p, lr=best), 3e-3)
    values = sorted(search.grid["lr"])
    assert search.complete and values[0] < search.point["lr"] < values[-1]
    assert abs(math.log2(search.point["lr"] / best)) <= 0.51
    limited = descend(START, {"lr": GRID["lr"]}, lambda p: bowl(p, lr=best), 3e-3, most=6)
    assert limited.complete and limited.out_of_budget and len(limited.wanted) == 6


def test_widening_keeps_to_ranges_and_stops_at_a_cliff():
    assert beyond("beta1", 0.98, 0.95) == pytest.approx(0.992) and beyond("momentum", 0.8, 0.9) == pytest.approx(0.6)
    assert beyond("beta2", 0.5, 0.9) is None and beyond("decay", 1.0, 0.8) is None
    assert beyond("weight_decay", 0.0, 0.1) is None and beyond("weight_decay", 0.2, 0.1) == 0.4
    assert beyond("precondition_frequency", 1, 5) is None and beyond("block_size", 512, 256) == 1024
    assert beyond("eps", 1e-30, 1e-25) is None and beyond("batch_size", 128, 256) is None
    search = descend(START, {"lr": (0.001, 0.002)}, lambda p: bowl(p, lr=0.1, cliff=0.01), 3e-3)
    assert search.point["lr"] == 0.008 and max(search.grid["lr"]) == 0.016
    words = descend(START | {"form": "a"}, {"form": ("a", "b")}, lambda p: 3.0 - (p["form"] == "b"), 3e-3)
    assert words.point["form"] == "b" and words.grid["form"] == ("a", "b")


def test_an_edge_is_never_insensitive_and_what_was_not_tried_does_not_diverge():
    a, b = Regime("a", 1), Regime("b", 1)
    falling = [({"lr": lr, "x": 1}, 3 - 10 * lr) for lr in (0.001, 0.002, 0.004)]
    (edge,) = classify("adamw", {"lr": (0.001, 0.002, 0.004)}, {a: falling, b: falling}, 6.4e-3)
    assert edge.sensitive and edge.edges == ("a@1x", "b@1x") and edge.excess == 0.0
    # The best was found by refining x: no slice through it, but one beside it.
    refined = [({"lr": lr, "x": 1}, 3 + abs(lr - 0.002)) for lr in (0.001, 0.002, 0.004)]
    refined.append(({"lr": 0.002, "x": 2}, 2.99))
    (lr,) = classify("adamw", {"lr": (0.001, 0.002, 0.004)}, {a: refined, b: refined}, 6.4e-3)
    assert not lr.sensitive and lr.value == 0.002 and lr.excess == 0.0
    apart = {a: refined, b: [({"lr": v, "x": 1}, 3.0) for v in (0.1, 0.2)]}
    (none,) = classify("adamw", {"lr": (0.001, 0.002)}, apart, 6.4e-3)
    assert none.sensitive and none.excess is None


def test_the_budget_of_runs_ends_the_search():
    search = descend(START, GRID, bowl, 3e-3, most=6)
    assert search.complete and search.out_of_budget and len(search.wanted) == 5


@settings(max_examples=30, deadline=None)
@given(st.integers(18, 40))
def test_refinement_spends_exactly_the_runs_it_is_given_and_never_loses(total):
    search = descend(START, GRID, lambda p: bowl(p, lr=0.0046), 3e-3)
    before = search.loss
    refine(search, GRID, lambda p: bowl(p, lr=0.0046), total)
    assert search.complete and len(search.wanted) == total and search.loss <= before
    assert all(p["beta1"] < 1 and p["warmup"] == int(p["warmup"]) for p in search.wanted)


def test_classification_by_the_second_threshold():
    regimes = [Regime("a", 1), Regime("b", 1)]
    tried = {}
    for regime, lr in zip(regimes, (0.002, 0.008)):
        search = descend(START, GRID, lambda p, lr=lr: bowl(p, lr=lr), 3e-3)
        tried[regime] = [(p, bowl(p, lr=lr)) for p in search.wanted]
    verdicts = {one.hyperparameter: one for one in classify("adamw", GRID, tried, 6.4e-3)}
    assert verdicts["lr"].sensitive and verdicts["lr"].optima == {"a@1x": 0.002, "b@1x": 0.008}
    assert not verdicts["beta1"].sensitive and verdicts["beta1"].value == 0.95
    assert verdicts["beta1"].excess == 0.0


THREE = """\
name: three
sequence_length: 64
models:
  tiny: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
  small: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}
  large: {num_layers: 2, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 2}
ratios: [1, 4]
data: {tokenizer: tokenizer.model, train: train, valid: valid}
defaults: {batch_size: 4}
optimizers:
  adamw: {start: {lr: 0.008}, grid: {lr: [0.002, 0.004, 0.008, 0.016], beta1: [0.8, 0.9]}}
  muon: {start: {lr: 0.016}, grid: {lr: [0.008, 0.016, 0.032]}}
phases:
  - {kind: descent, regimes: [tiny@1x, small@1x, tiny@4x]}
  - {kind: restricted, regimes: [small@4x]}
  - {kind: predict, regimes: [large@1x]}
"""


def finish(study, loss):
    """Answer everything the planner asks for until it is done."""
    known, rounds = {}, 0

    def lookup(run):
        return known.get(run.id)

    while True:
        found = Planner(study, lookup).phases()
        fresh = [run for _, progress in found for run in progress.wanted if run.id not in known]
        if not fresh:
            return found
        known.update({run.id: loss(run) for run in fresh})
        rounds += 1
        assert rounds < 50


def test_three_phases_end_with_a_predicted_run_and_equal_effort(make_study):
    study = read_study(make_study(THREE))

    def loss(run):
        n = study.models[run.regime.model].non_embedding_parameters
        best = {"adamw": 0.008, "muon": 0.016}[run.optimizer] * (2e4 / n) ** 0.5
        return 3 + 0.05 * math.log2(run.hyper["lr"] / best) ** 2 + 0.1 * (run.hyper.get("beta1", 0.9) - 0.9) ** 2

    found = finish(study, loss)
    phases = {phase.kind: progress for phase, progress in found}
    assert list(phases) == ["descent", "restricted", "predict"] and all(p.complete for p in phases.values())
    verdicts = {
        (t["optimizer"], t["hyperparameter"]): t["sensitive"]
        for t in phases["descent"].trace
        if t["kind"] == "sensitivity"
    }
    assert verdicts == {("adamw", "lr"): True, ("adamw", "beta1"): False, ("muon", "lr"): True}
    for kind in ("descent", "restricted"):
        for regime in {run.regime for run in phases[kind].wanted}:
            counts = {
                name: sum(r.regime == regime and r.optimizer == name for r in phases[kind].wanted)
                for name in study.optimizers
            }
            assert counts["adamw"] == counts["muon"], (kind, regime)
    predicted = {run.optimizer: run.hyper["lr"] for run in phases["predict"].wanted}
    n = study.models["large"].non_embedding_parameters
    assert len(phases["predict"].wanted) == 2
    for name, base in (("adamw", 0.008), ("muon", 0.016)):
        assert predicted[name] == pytest.approx(base * (2e4 / n) ** 0.5, rel=0.35)


def test_free_effort_lets_each_optimizer_stop_when_it_has_converged(make_study):
    study = read_study(make_study(THREE.replace("ratios:", "effort: free\nratios:")))
    found = finish(study, lambda run: 3 + 0.05 * math.log2(run.hyper["lr"] / 0.008) ** 2)
    wanted = found[0][1].wanted
    counts = {name: sum(run.optimizer == name for run in wanted) for name in study.optimizers}
    assert counts["adamw"] > counts["muon"]
