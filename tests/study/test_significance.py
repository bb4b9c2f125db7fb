"""Paired statistics: what is said with and without a true difference, and what is not said."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.study_significance import sequential, table
from megatron_opt.study.dataset import Seeded, best_of_cell
from megatron_opt.study.fits.significance import SeedNoise, compare_all, own_noise, power, seeds_for
from megatron_opt.study.phases import Planner
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record
from megatron_opt.study.study_file import read_study
from tests.study.conftest import STUDY

A, B = Regime("a", 1.0), Regime("b", 1.0)


def record(lr, seed, loss, name="muon"):
    status = "diverged" if loss is None else "completed"
    return Record(
        f"{name}-{lr}-{seed}",
        name,
        A,
        seed,
        {"lr": lr},
        {},
        [],
        1,
        1,
        status,
        1,
        0,
        None,
        None,
        None,
        loss,
        {},
        None,
    )


def test_better_is_rare_without_a_difference_and_common_with_one():
    rng = np.random.default_rng(0)
    # Ten regimes, five sizes at two budgets: smaller tables know their own noise less well, and find .67 to .84.
    null = np.mean([any(c.verdict == "better" for c in table(rng, 0.0, regimes=10)) for _ in range(150)])
    found = np.mean([np.mean([c.verdict == "better" for c in table(rng, 0.05, regimes=10)]) for _ in range(60)])
    assert null <= 0.06 and found >= 0.85
    assert np.mean([sequential(rng, 0.0, 4) for _ in range(100)]) <= 0.06


def test_the_own_noise_is_measured_beside_what_seeds_share_also_where_seeds_are_missing():
    rng, cells = np.random.default_rng(1), {}
    for r in range(200):
        seed = 0.5 * rng.standard_normal(4)
        for k in range(3):
            kept = 4 if k < 2 else 2
            losses = seed[:kept] + 0.1 * k + 0.01 * rng.standard_normal(kept)
            cells[f"o{k}", Regime(f"m{r}", 1.0)] = Seeded(tuple(losses), tuple(range(kept)))
    noise = own_noise(cells)
    assert noise.freedom == 200 * (10 - 3 - 4 + 1)
    assert noise.sigma == pytest.approx(0.01, rel=0.1)


def test_p_values_are_those_of_a_paired_t_test_where_one_pair_is_all_there_is():
    from scipy import stats

    a, b = (3.01, 2.95, 3.08, 3.02), (3.05, 3.00, 3.10, 3.09)
    cells = {("adamw", A): Seeded(b, (1, 2, 3, 4)), ("muon", A): Seeded(a, (1, 2, 3, 4))}
    (one,) = compare_all(cells, "adamw", ["adamw", "muon"], [A])
    test = stats.ttest_rel(b, a)
    interval = test.confidence_interval(0.95)
    assert one.p == pytest.approx(test.pvalue) and one.adjusted == one.p
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high))
    (looked,) = compare_all(cells, "adamw", ["muon"], [A], looks=3)
    assert looked.p == pytest.approx(min(1, 3 * test.pvalue)) and looked.low < one.low


def test_holm_corrects_the_table_step_by_step():
    rng, cells = np.random.default_rng(2), {}
    for k, gain in enumerate((0.0, 0.001, 0.004, 0.02)):
        cells[f"o{k}", A] = Seeded(tuple(3 - gain + 0.002 * rng.standard_normal(5)), tuple(range(5)))
    found = sorted(compare_all(cells, "o0", ["o1", "o2", "o3"], [A]), key=lambda one: one.p)
    expected = np.minimum(1, np.maximum.accumulate([one.p * (3 - i) for i, one in enumerate(found)]))
    assert [one.adjusted for one in found] == pytest.approx(expected.tolist())


def test_nothing_is_said_of_one_seed_or_of_the_seed_that_chose():
    cells = {("adamw", A): Seeded((3.0,), (1,)), ("muon", A): Seeded((2.0,), (1,))}
    (one,) = compare_all(cells, "adamw", ["muon"], [A])
    assert one.p is None and one.verdict == "cannot be said" and one.why == "one seed"
    both = cells | {(name, B): Seeded((3.0, 3.1), (1, 2)) for name in ("adamw", "muon")}
    assert compare_all(both, "adamw", ["muon"], [A])[0].p is None
    chosen = {key: replace(cell, chosen=True) for key, cell in cells.items()}
    assert "chosen" in compare_all(chosen, "adamw", ["muon"], [A])[0].why


def test_unshared_seeds_fall_back_to_the_total_noise():
    rng = np.random.default_rng(3)
    cells = {
        ("adamw", A): Seeded(tuple(3 + 0.03 * rng.standard_normal(6)), tuple(range(6))),
        ("muon", A): Seeded(tuple(2.9 + 0.03 * rng.standard_normal(6)), tuple(range(6, 12))),
    }
    (one,) = compare_all(cells, "adamw", ["muon"], [A], plan=True)
    assert not one.paired and one.verdict == "better" and one.seeds_needed is None
    from scipy import stats

    assert one.p == pytest.approx(stats.ttest_ind(cells["adamw", A].losses, cells["muon", A].losses).pvalue)


def test_the_seed_that_chose_a_configuration_is_left_out_of_its_mean():
    rows = [record(0.1, 1, 3.0), record(0.2, 1, 2.9), record(0.4, 1, None)]
    alone = best_of_cell(rows)
    assert alone.chosen and alone.loss == 2.9
    best = best_of_cell([*rows, record(0.2, 2, 3.1), record(0.2, 0, 3.3)])
    assert (best.record.id, best.seeds, best.loss) == ("muon-0.2-1", (0, 2), pytest.approx(3.2))
    assert best.ids == ("muon-0.2-0", "muon-0.2-2") and not best.chosen
    predicted = best_of_cell([record(0.1, 1, 3.0), record(0.1, 2, 3.2)])
    assert predicted.seeds == (1, 2) and not predicted.chosen


def test_the_seeds_that_are_asked_for_give_the_power():
    own = SeedNoise(0.012, 8)
    assert seeds_for(0.05, own) == 2 and seeds_for(0.05, SeedNoise(math.nan, 0)) is None
    needed = seeds_for(0.01, own)
    assert power(0.01, own, needed) >= 0.8 > power(0.01, own, needed - 1)
    assert seeds_for(1e-6, own) is None


def test_further_seeds_go_where_the_decision_is_open(make_study):
    text = STUDY.replace(
        "data:\n", "  wide: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 2}\ndata:\n"
    )
    study = read_study(make_study(text + "seeds: [1, 2, 3, 4, 5]\n"))
    asked = {}

    def loss(run):
        rng = np.random.default_rng([run.seed, len(run.optimizer), len(run.regime.model)])
        gain = 0.5 if run.optimizer == "muon" and run.regime.model == "tiny" else 0.0
        return 3 + 0.1 * run.seed - gain + 0.02 * rng.standard_normal() + abs(run.hyper["lr"] - 0.008)

    while True:
        found = Planner(study, lambda run: asked.get(run.id, (None, None))[1]).phases()
        fresh = {run.id: run for _, p in found for run in p.wanted if run.id not in asked}
        if not fresh:
            break
        # Any order gives the same: one result at a time, the last first.
        run = list(fresh.values())[-1]
        asked[run.id] = (run, loss(run))
    counts = {}
    for run, _ in asked.values():
        counts.setdefault((run.regime.model, run.optimizer), set()).add(run.seed)
    assert counts["tiny", "muon"] == counts["tiny", "adamw"] == {1, 2, 3}
    assert counts["wide", "muon"] == counts["wide", "adamw"] == {1, 2, 3, 4, 5}
    looks = [step for step in found[-1][1].trace if step["kind"] == "look"]
    assert looks[0]["settled"] == [["muon", "tiny@1x", "better"]] and looks[0]["open"] == 1
