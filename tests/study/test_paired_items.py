"""McNemar's test over items and seeds: against the binomial formula, against all sign flips, and for its level."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from megatron_opt.study import downstream
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.paired_items import baseline_tests, disagreements, sign_flip
from megatron_opt.study.fits.significance import holm
from megatron_opt.study.report.accuracy import accuracy
from tests.study.test_wall_clock import record


def test_one_seed_is_mcnemars_binomial_test():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.random((2, 1, 60)) < 0.6
        gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
        expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert sign_flip(first, second) == pytest.approx(expected, rel=1e-9)
    same = rng.random((1, 9)) < 0.5
    assert sign_flip(same, same) == 1.0


def test_several_seeds_are_all_sign_flips_of_items():
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 3, 9)) < 0.5
    d = second.sum(0).astype(int) - first.sum(0)
    flips = [abs(np.dot(signs, d)) >= abs(d.sum()) for signs in itertools.product((-1, 1), repeat=len(d))]
    assert sign_flip(first, second) == pytest.approx(np.mean(flips), rel=1e-9)


def test_items_that_repeat_over_seeds_are_no_further_evidence():
    """Both models answer an item the same way in all seeds: pooled as 3 × 40 answers, too many draws would look different."""
    rng, rejected, pooled, draws = np.random.default_rng(2), 0, 0, 400
    for _ in range(draws):
        first, second = (np.repeat(rng.random((1, 40)) < 0.5, 3, 0) for _ in range(2))
        rejected += sign_flip(first, second) < 0.05
        pooled += sign_flip(first.reshape(1, -1), second.reshape(1, -1)) < 0.05
    assert rejected / draws <= 0.07 < 0.15 < pooled / draws


def test_holm_by_hand():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def _results(right, digest="x"):
    bits = "".join("1" if one else "0" for one in right)
    metrics = {"acc": {"value": float(np.mean(right)), "stderr": 0.03}}
    return {
        "iterations": 5,
        "evaluation": {"iter_0000005": {"cloze": {"metrics": metrics}}},
        "items": {"cloze": {"right": bits, "digest": digest}},
    }


def _study(rates, losses, seeds=3, items=400, digests=("x", "x")):
    rng = np.random.default_rng(3)
    records = []
    for (name, rate), loss, digest in zip(rates.items(), losses, digests):
        for seed in range(seeds):
            one = record(name, seed, loss + 0.001 * seed, 1.0)
            one.results.update(_results(rng.random(items) < rate, digest))
            records.append(one)
    return Dataset("d", "adamw", records)


def test_an_order_that_disagrees_is_found_with_its_p():
    data = _study({"adamw": 0.70, "muon": 0.55}, (3.1, 3.0))
    (one,) = baseline_tests(data)
    assert one.second == "muon" and one.significant and one.items == 400 and one.seeds == 3
    assert one.p_seeds is not None and one.p_seeds < 0.05
    (apart,) = disagreements(data)
    assert (apart.first, apart.second) == ("muon", "adamw") and apart.adjusted == pytest.approx(one.p)
    tables = accuracy(data).tables
    assert [table.rows[0][-1] for table in tables[1:]] == ["lower", "yes"]
    assert tables[2].rows[0][2].startswith("muon (3.0010)") and tables[2].rows[0][3].startswith("adamw")


def test_no_difference_is_not_made_one_and_other_items_are_not_paired():
    alike = _study({"adamw": 0.6, "muon": 0.6}, (3.1, 3.0))
    assert accuracy(alike).tables[1].rows[0][-1] == "not settled"
    assert baseline_tests(_study({"adamw": 0.7, "muon": 0.5}, (3.1, 3.0), digests=("x", "y"))) == []


def test_items_of_a_run_are_kept_as_bits(tmp_path):
    lines = [
        {"task": "t", "item": k, "doc_hash": f"h{k}", "metrics": {"acc": value, "acc_norm": 1.0}}
        for k, value in enumerate((1.0, 0.0, 1.0))
    ]
    lines.append({"task": "p", "item": 0, "doc_hash": "q", "metrics": {"word_perplexity": 3.0}})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = downstream.items(json.loads(json.dumps(downstream.file_items({}, tmp_path))))
    assert list(kept) == ["t"] and kept["t"].right == (True, False, True)
    lines[1]["doc_hash"] = "other"
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert downstream.items(downstream.file_items({}, tmp_path))["t"].digest != kept["t"].digest
    assert downstream.file_items({"a": 1}, tmp_path / "none") == {"a": 1}
