"""The five published findings on simulated stores: where they hold, where they do not, and where nothing can be said."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_opt.study.commands.findings import page
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.findings import FAILS, HOLDS, MISSING, OPEN, findings
from megatron_opt.study.spec import Regime
from tests.study.test_wall_clock import record

LOSS = {"adamw": 3.00, "lion": 3.02, "sophia": 2.97}
SECONDS = {"adamw": 100.0, "lion": 80.0, "sophia": 130.0}
RIGHT = {"adamw": 0.75, "lion": 0.65, "sophia": 0.65}
AGAIN = {"adamw": 0.10, "lion": 0.03, "sophia": 0.03}
RATE = {"gpt": 0.004, "llama": 0.008}


def world(seeds=3, noise=0.001, loss=LOSS, again=AGAIN, rate=RATE):
    """Proxies with a sweep of rates, targets read once and twice; every claim of the source is true."""
    rng, records, items = np.random.default_rng(0), [], 600
    for family, size in (("gpt", 40_000), ("llama", 41_000)):
        for name in LOSS:
            for lr in (0.001, 0.002, 0.004, 0.008, 0.016):
                value = 4 + 0.2 * np.log2(lr / rate[family]) ** 2
                one = record(name, 1, value, 10.0, Regime(f"{family}-s", 1))
                records.append(replace(one, id=f"{one.id}{lr}", hyper={"lr": lr}, parameters=size))
            for seed in range(1, 1 + seeds):
                common = rng.normal(0, 5 * noise)
                for regime, gain in ((Regime(f"{family}-l", 1), 0.0), (Regime(f"{family}-l", 2, 2), again[name])):
                    own = rng.normal(0, noise)
                    one = record(name, seed, loss[name] - gain + common + own, SECONDS[name], regime)
                    one.results["train_time_s"] *= 1 + 0.01 * rng.normal()
                    bits = "".join("01"[int(x)] for x in rng.random(items) < RIGHT[name])
                    one.results["items"] = {"cloze": {"right": bits, "digest": "x"}}
                    records.append(replace(one, id=f"{one.id}{regime}", parameters=10 * size))
    return Dataset("budget", "adamw", records)


def verdicts(dataset):
    return {(one.claim, one.family): one.verdict for one in findings(dataset)}


def test_a_world_where_all_are_true():
    found = verdicts(world())
    claims = ("Lion is the fastest", "Sophia has the lowest loss", "AdamW is the best downstream", "Epochs help")
    assert {found[claim, family] for claim in claims for family in RATE} == {HOLDS}
    assert {found["Epochs help AdamW most", family] for family in RATE} == {HOLDS}
    assert {found["LLaMA's rate is twice GPT's", name] for name in LOSS} == {HOLDS}


def test_what_is_false_or_cannot_be_told_is_not_made_true():
    false = verdicts(
        world(
            loss={"adamw": 2.9, "lion": 3.0, "sophia": 2.97},
            again=dict.fromkeys(LOSS, 0.05),
            rate={"gpt": 0.008, "llama": 0.004},
        )
    )
    assert false["Sophia has the lowest loss", "gpt"] == FAILS and false["LLaMA's rate is twice GPT's", "lion"] == FAILS
    assert false["Epochs help", "gpt"] == HOLDS and false["Epochs help AdamW most", "gpt"] == OPEN
    noisy = verdicts(world(noise=0.2))
    assert noisy["Sophia has the lowest loss", "llama"] == OPEN
    single = verdicts(world(seeds=1))
    assert {single[claim, "gpt"] for claim in ("Lion is the fastest", "Sophia has the lowest loss", "Epochs help")} == {
        OPEN
    }


def test_the_page_says_what_was_not_run():
    whole = world()
    text = page(whole)
    assert "| Lion is the fastest | gpt-l@1x |" in text and "**holds**" in text and "## Repeated data" in text
    part = Dataset("budget", "adamw", [r for r in whole.records if r.regime.model.endswith("-s")])
    found = verdicts(part)
    assert found["AdamW is the best downstream", "gpt"] == MISSING and found["Epochs help", "llama"] == MISSING
    assert "the runs that would tell are not there" in page(part)


def test_what_was_planned_and_has_no_run_yet_is_said_to_be_missing():
    whole = world()
    first = [r for r in whole.records if r.regime.model == "gpt-s"]
    part = replace(whole, records=first, planned=whole.sizes, _best=None)
    found = verdicts(part)
    assert set(found) == set(verdicts(whole)) and set(found.values()) == {MISSING}
    assert "No run of llama-s@1x, gpt-l@1x, gpt-l@2x-2ep, llama-l@1x, llama-l@2x-2ep is finished." in page(part)
    late = [r for r in whole.records if (r.optimizer, r.regime) != ("lion", Regime("gpt-l", 1))]
    found = verdicts(replace(whole, records=late, _best=None))
    assert {found[claim, "gpt"] for claim in ("Sophia has the lowest loss", "Epochs help")} == {MISSING}


def test_averaged_weights_stand_beside_the_raw_ones_where_a_study_has_them():
    whole = world()
    assert "Averaged weights" not in page(whole)
    averaged = [
        replace(r, results=r.results | {"final_valid_loss": r.loss, "final_valid_ema_loss": r.loss - 0.25})
        for r in whole.records
    ]
    for data in (whole, replace(whole, records=[r for r in whole.records if r.optimizer != "lion"], _best=None)):
        mine = [one for one in averaged if one.id in {r.id for r in data.records}]
        text = page(replace(data, records=mine, _best=None))
        assert "## Averaged weights" in text and "| moving average |" in text and "| +0.2500 |" in text


@pytest.mark.parametrize("left", ["lion", "sophia"])
def test_a_study_without_one_of_the_three_says_so(left):
    data = world()
    found = verdicts(Dataset("b", "adamw", [r for r in data.records if r.optimizer != left]))
    claim = {"lion": "Lion is the fastest", "sophia": "Sophia has the lowest loss"}[left]
    assert found[claim, "gpt"] == MISSING
