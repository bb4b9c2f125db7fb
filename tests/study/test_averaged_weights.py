"""Averaged weights beside raw ones: a paired test over seeds, by hand, and only where both losses are known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from megatron_opt.study.dataset import Dataset
from megatron_opt.study.report.averaged_weights import averaged_weights
from tests.study.test_wall_clock import record

RAW = {"adamw": [3.10, 3.20, 3.00], "muon": [2.95, 3.05, 2.90]}
MEAN = {"adamw": [3.06, 3.17, 2.97], "muon": [2.96, 3.05, 2.91]}


def dataset(ema=()):
    records = []
    for name in RAW:
        for seed in range(3):
            loss = lambda value: {"validation_loss": {"metrics": {"loss": {"value": value, "stderr": 0.1}}}}  # noqa: E731
            results = {"iterations": 5, "final_valid_loss": RAW[name][seed]}
            both = loss(RAW[name][seed] + 0.5), loss(MEAN[name][seed] + 0.5)  # another measure than training's
            results["evaluation"] = {"iter_0000005": both[0], "iter_0000005 mean of 3": both[1]}
            if name in ema:
                results["final_valid_ema_loss"] = RAW[name][seed] - 0.25
            one = record(name, seed, RAW[name][seed], 1.0)
            records.append(replace(one, results=one.results | results))
    return Dataset("d", "adamw", records)


def test_the_gain_is_paired_over_seeds():
    (table,) = averaged_weights(dataset()).tables
    rows = {row[1]: dict(zip(table.header, row)) for row in table.rows}
    d = np.subtract(RAW["adamw"], MEAN["adamw"])
    reach = stats.t(2).isf(0.025) * d.std(ddof=1) / np.sqrt(3)
    assert rows["adamw"]["gain"] == f"{d.mean():+.4f}" and rows["adamw"]["weights"] == "mean of 3"
    assert rows["adamw"]["95% interval"] == f"{d.mean() - reach:+.4f} to {d.mean() + reach:+.4f}"
    p = {name: stats.ttest_rel(RAW[name], MEAN[name]).pvalue for name in RAW}
    assert float(rows["adamw"]["p (Holm)"]) == pytest.approx(2 * min(p.values()), rel=0.05)
    assert (rows["adamw"]["raw"], rows["adamw"]["averaged"]) == ("3.6000", "3.5667")
    assert rows["adamw"]["averaged are"] == "better" and rows["muon"]["averaged are"] == "not settled"


def test_a_moving_average_has_the_loss_that_training_gave_it():
    (table,) = averaged_weights(dataset(ema=["muon"])).tables
    actual = [row[1:6] for row in table.rows if row[2] == "moving average"]
    assert actual == [["muon", "moving average", "2.9667", "2.7167", "+0.2500"]]


def test_without_averages_nothing_is_said():
    plain = dataset()
    for one in plain.records:
        del one.results["evaluation"]["iter_0000005 mean of 3"]
    assert not averaged_weights(plain).tables
