"""What FP8 does to optimizers, on simulated stores: costs, gains that survive or not, rates that move, what is lost."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_opt.report.csv_files import write_plot_csv
from megatron_opt.study.commands.findings import page
from megatron_opt.study.curves import Curve
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.findings import FAILS, HOLDS, MISSING, OPEN
from megatron_opt.study.fits.precision import FREE, STAYS, SURVIVES, best_rates, pairs, precision_findings
from megatron_opt.study.report.precision import precision, precision_names
from megatron_opt.study.report.precision_ranges import fp8_ranges
from megatron_opt.study.spec import Regime
from tests.study.test_wall_clock import record

LOSS = {"adamw": 3.0, "muon": 2.9}
RATE = {"adamw": 0.008, "muon": 0.032}


def world(cost, moved=1.0, seeds=3, noise=0.0005):
    """bf16 and MXFP8; `cost` of FP8 by optimizer, and the factor by which it moves best rates."""
    rng, records = np.random.default_rng(0), []
    common = rng.normal(0, 0.03, seeds)
    for model, recipe in (("plain", None), ("mx", "mxfp8")):
        flags = {"hidden-size": 64, "num-layers": 2, "bf16": True} | (
            {"fp8-format": "e4m3", "fp8-recipe": recipe} if recipe else {}
        )
        for name, best in RATE.items():
            at = best * (moved if recipe else 1.0)
            floor = LOSS[name] + (cost.get(name, 0.0) if recipe else 0.0)
            rates = [best / 4, best / 2, best, best * 2, best * 4]
            tuned = min(rates, key=lambda lr, at=at: abs(np.log(lr / at)))
            for seed in range(seeds):
                for lr in rates if not seed else [tuned]:
                    loss = floor + 0.1 * np.log2(lr / at) ** 2 + common[seed] + rng.normal(0, noise)
                    one = record(name, seed + 1, float(loss), 10.0, Regime(model, 1))
                    records.append(replace(one, id=f"{one.id}{model}{lr}", hyper={"lr": lr}, config={"flags": flags}))
    return Dataset("precision", "adamw", records)


def verdicts(dataset):
    found = precision_findings(dataset)
    return {(question, one.family): one.verdict for question, rows in found.items() for one in rows}


def test_free_precision_keeps_gains_and_rates():
    assert [(one.recipe, str(one.plain)) for one in pairs(world({}))] == [("mxfp8", "plain@1x")]
    found = verdicts(world({}))
    assert found == {
        (FREE, "adamw"): HOLDS,
        (FREE, "muon"): HOLDS,
        (SURVIVES, "muon"): HOLDS,
        (STAYS, "adamw"): HOLDS,
        (STAYS, "muon"): HOLDS,
    }


def test_a_gain_that_is_lost_and_rates_that_move():
    lost = verdicts(world({"muon": 0.1}))
    assert lost[FREE, "muon"] == FAILS and lost[FREE, "adamw"] == HOLDS and lost[SURVIVES, "muon"] == FAILS
    both = verdicts(world({"muon": 0.05, "adamw": 0.05}))
    assert both[FREE, "adamw"] == FAILS and both[SURVIVES, "muon"] == HOLDS
    assert verdicts(world({}, moved=2.0))[STAYS, "muon"] == FAILS


@pytest.mark.parametrize("seeds, noise", [(1, 0.0005), (3, 0.2)])
def test_nothing_is_said_without_seeds_or_in_noise(seeds, noise):
    found = verdicts(world({}, seeds=seeds, noise=noise))
    assert {found[asked, "muon"] for asked in (FREE, SURVIVES, STAYS)} == {OPEN}


def test_a_seeds_luck_does_not_move_a_best_rate():
    """The best rate's further seeds lie lower than the one that all rates ran on: the vertex is that of one seed's losses."""
    data = world({}, noise=0.0)
    lucky = [replace(one, loss=one.loss - 0.5 * (one.seed > 1)) for one in data.records]
    plain, shifted = best_rates(data), best_rates(replace(data, records=lucky))
    assert plain and {key: one.log_value for key, one in plain.items()} == {
        key: one.log_value for key, one in shifted.items()
    }


def with_ranges(data):
    lost = {"qkv": {"weight": {"amax": 1.5, "underflows": 0.25, "overflows": 0.0}}}
    data.curve = lambda run: Curve([{"iteration": n, "grad_norm": 1.0, "fp8_ranges": lost} for n in (10, 20)])
    return data


def test_the_page_and_what_was_not_run():
    data = with_ranges(world({"muon": 0.1}))
    text = page(data)
    assert "# precision: what FP8 does to optimizers" in text and "## Steadiness" in text
    assert "| qkv | weight |" in text and "25.000% (adamw 25.000%)" in text and "| qkv | weight | 1.5 | 1.5 |" in text
    assert "underflows up to 25.000% (weight of qkv), no overflows" in text and "Share of overflows" not in text
    assert "A loss is the mean over 2 seeds; rates were chosen on seed 1, which is in no comparison." in text
    assert "**The gain survives**: muon (does not hold: mxfp8)." in text
    names = {plot.name for plot in fp8_ranges(data, precision_names(data)).plots}
    assert {"fp8-underflows-mx@1x", "fp8-overflows-mx@1x"} < names
    part = replace(data, records=[r for r in data.records if (r.optimizer, r.regime.model) != ("muon", "mx")])
    assert verdicts(part)[SURVIVES, "muon"] == MISSING
    missing = page(part)
    assert "the runs that would tell are not there" in missing and "muon's gain over adamw survives" not in missing
    assert "muon (not run: mxfp8)" in missing
    assert "budget" not in page(replace(data, records=[r for r in data.records if r.regime.model == "plain"]))[:40]


def test_the_pages_figures(tmp_path):
    """Gains, costs and rates, and a panel for each tensor and kind of layer; no figure of overflows where there are none."""
    to = tmp_path / "precision.md"
    text = page(with_ranges(world({"muon": 0.1})), to=to)
    drawn = {path.name for path in (tmp_path / "precision").iterdir()}
    assert drawn == {f"precision-{name}.png" for name in ("gains", "costs", "rates", "underflows", "amax")}
    assert all(f"(precision/{name})" in text for name in drawn)


def test_a_points_place_within_its_category_does_not_change_its_name(tmp_path):
    """Optimizers stand beside one another, from half a width left to half a width right."""
    (gained, cost), file = precision(world({"muon": 0.1}))[0].plots, tmp_path / "plot.csv"
    assert [x - round(x) for series in cost.series for x in series.x] == [-0.25, 0.25]
    for plot in (gained, cost):
        write_plot_csv(plot, file)
        rows = [line.split(",")[:2] for line in file.read_text().splitlines()[1:]]
        assert rows == [[one.label, name] for one in plot.series for name in plot.x_names]
