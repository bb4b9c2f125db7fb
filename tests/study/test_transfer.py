"""A transfer phase: what it asks for, what it finds in a world where rates move with the width without µP and not with it."""

import math

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli
from megatron_opt.study.dataset import from_store
from megatron_opt.study.fits.transfer import Carried, Transfer, transfer_of, vertex
from megatron_opt.study.phases import Planner
from megatron_opt.study.report.transfer import transfer_over_width
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Store
from megatron_opt.study.study_file import read_study
from tests.study.conftest import STUDY

MODELS = """\
  wide: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4}
  wider: {num_layers: 2, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 8}
data:
"""
PHASES = "phases: [{kind: transfer, proxy: tiny@1x, regimes: [wide@1x, wider@1x]}]\n"
TRANSFER = STUDY.replace("data:\n", MODELS).replace("[0.004, 0.008, 0.064]", "[0.002, 0.004, 0.008, 0.016]")
TRANSFER = TRANSFER.replace("[0.008, 0.016, 0.032]", "[0.004, 0.008, 0.016, 0.032]") + PHASES


def test_the_phase_asks_for_the_proxy_first_and_shares_it_between_both(make_study):
    study, known = read_study(make_study(TRANSFER + "seeds: [1, 2, 3]\n")), {}
    planner = lambda: Planner(study, lambda run: known.get(run.id)).phases()  # noqa: E731

    def answer(run):
        width = run.config["flags"]["hidden-size"]
        best = 0.008 if "use-mup" in run.config["flags"] else 0.008 * 32 / width
        return 3 + 0.1 * math.log2(run.hyper["lr"] / best) ** 2

    (_, progress), *_ = planner()
    assert {run.regime.model for run in progress.wanted} == {"tiny"} and not progress.complete
    while not progress.complete:
        known |= {run.id: answer(run) for run in progress.wanted}
        progress = planner()[0][1]
    wanted = {run.id: run for run in progress.wanted}.values()
    proxy = [run for run in wanted if run.regime.model == "tiny"]
    assert not any("use-mup" in run.config["flags"] for run in proxy)
    assert {run.seed for run in proxy} == {1, 2, 3}
    flags = next(run.config["flags"] for run in wanted if run.regime.model == "wider" and "mup" in run.hyper)
    assert (flags["use-mup"], flags["mup-base-hidden-size"], flags["mup-base-head-dim"]) == (True, 32, 16)
    found = {(s["optimizer"], s["regime"], s["parametrization"]): s for s in progress.trace if s["kind"] == "transfer"}
    assert len(found) == 8
    assert found["adamw", "wider@1x", "mup"]["best"]["lr"] == 0.008
    assert found["adamw", "wider@1x", "standard"]["best"]["lr"] == 0.002
    assert found["adamw", "wider@1x", "standard"]["carried"]["lr"] == 0.008
    alone = [
        r
        for r in wanted
        if r.regime == Regime("wider", 1) and r.optimizer == "adamw" and "mup" in r.hyper and r.seed > 1
    ]
    assert len(alone) == 2  # carried and best are one: repeated once
    again = [
        r
        for r in wanted
        if r.regime == Regime("wider", 1) and r.optimizer == "adamw" and "mup" not in r.hyper and r.seed > 1
    ]
    assert len(again) == 4


def test_a_study_finds_the_drift_and_what_it_costs(make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DRIFT", "1")
    path, output = make_study(TRANSFER + "seeds: [1, 2, 3]\n"), tmp_path / "out"
    assert cli.main(["run", str(path), "--output", str(output)], "study") == 0
    with Store(output / "study.sqlite") as store:
        dataset = from_store(store)
    found = transfer_of(dataset)
    (proxy,) = {one.proxy for one in found.rows}
    assert found.drift("adamw", "standard", proxy)[0] == pytest.approx(-1, abs=0.05)
    assert found.drift("adamw", "mup", proxy)[0] == pytest.approx(0, abs=0.05)
    by_key = {(r.optimizer, r.parametrization, r.regime.model): r for r in found.rows}
    far = by_key["adamw", "standard", "wider"]
    assert far.loss_lost == pytest.approx(0.03 * 4, abs=0.01) and far.lost.verdict == "better"
    assert far.lost.low < 0.12 < far.lost.high
    assert by_key["adamw", "mup", "wider"].same and by_key["adamw", "mup", "wider"].loss_lost == 0
    worth = {(one.optimizer, one.regime.model): one for one in found.worth}
    assert worth["muon", "wider"].gain == pytest.approx(0.12, abs=0.01) and worth["muon", "wider"].verdict == "better"
    section = transfer_over_width(dataset)
    assert [len(table.rows) for table in section.tables] == [4, 8, 4]
    assert {plot.name for plot in section.plots} >= {"transfer-optimum", "transfer-adamw-mup"}
    assert (output / "report" / "figures" / "transfer-optimum.png").is_file()
    assert "Transfer over width" in (output / "report" / "index.html").read_text()


def test_rates_that_are_carried_alone_are_not_swept(make_study, tmp_path):
    text = TRANSFER.replace("wider@1x]", "wider@1x], sweep: false") + "seeds: [1, 2]\n"
    study, known = read_study(make_study(text)), {}
    for _ in range(6):
        (_, progress) = Planner(study, lambda run, known=known: known.get(run.id)).phases()[0]
        known |= {run.id: 3.0 + run.hyper["lr"] + 0.1 * ("mup" not in run.hyper) for run in progress.wanted}
    assert progress.complete and all(step["best"] is None for step in progress.trace if step["kind"] == "transfer")
    wanted = list({run.id: run for run in progress.wanted}.values())
    assert len([run for run in wanted if run.regime.model == "wider"]) == 2 * 2 * 2
    with Store(tmp_path / "s.sqlite", create=True) as store:
        store.plan("transfer", wanted, {"tiny": 1, "wide": 2, "wider": 3})
        for run in wanted:
            store.finish(run.id, {"final_valid_loss": known[run.id]}, None)
        store.set_meta("trace", progress.trace)
        dataset = from_store(store)
    found = transfer_of(dataset)
    assert all(row.loss_lost is None and row.best_lr is None for row in found.rows) and len(found.worth) == 4
    assert found.worth[0].gain == pytest.approx(0.1) and len(found.worth[0].seeds) == 2
    section = transfer_over_width(dataset)
    assert {row[-2] for row in section.tables[1].rows} == {"not swept"} and len(section.plots) == 1


def test_the_vertex_of_a_parabola():
    curve = [(rate, 2 + 0.3 * math.log(rate / 0.011) ** 2) for rate in (0.004, 0.008, 0.016, 0.032)]
    assert vertex(curve, 0.008) == (pytest.approx(0.011), False)
    assert vertex(curve, 0.004) == (0.004, True)
    assert vertex([*curve[:2], (0.016, math.inf)], 0.008) == (0.008, False)


def test_the_plan_counts_a_transfer(make_study, capsys):
    assert cli.main(["plan", str(make_study(TRANSFER + "seeds: [1, 2, 3]\n"))], "study") == 0
    said = capsys.readouterr().out
    # at the proxy 4 rates and 2 seeds; at each of two widths, twice, 4 rates and 2 to 4 seeds
    assert "30 to 38" in said


@pytest.mark.parametrize(("old", "new", "said"), [
    ("proxy: tiny@1x, ", "", "a phase lacks `proxy:`"),
    ("proxy: tiny@1x", "prxy: tiny@1x", "lacks `proxy:`|did you mean `proxy`"),
    ("tiny@1x", "nano@1x", "names no model of `models:`"),
    ("tiny@1x", "wide@1x", "wide@1x is no wider than the proxy"),
    (", regimes: [wide@1x, wider@1x]", "", "phase 'transfer' needs `regimes:`"),
    ("wider@1x]", "wider@1x], parametrizations: [mup, sp]", "`parametrizations:` must be different ones of standard, mup"),
    ("transfer, proxy", "grid, proxy", "unknown key `proxy`"),
])  # fmt: skip
def test_mistakes_in_the_file(make_study, old, new, said):
    assert old in PHASES
    with pytest.raises(UserError, match=rf"study.yaml:\d+: .*({said})"):
        read_study(make_study(TRANSFER.replace(PHASES, PHASES.replace(old, new))))


def test_widths_that_two_proxies_reach_are_two_lines():
    def row(model, proxy, optimum):
        return Carried(
            "adamw", "mup", Regime(model, 1), Regime(proxy, 4), 64, 1.0, 1.0, optimum, False, (), 3.0, 3.0, None
        )

    found = Transfer([row("gpt-64", "gpt-32", 0.5), row("llama-64", "llama-32", 4.0)])
    found.proxies = {("adamw", Regime("gpt-32", 4)): (32, 1.0), ("adamw", Regime("llama-32", 4)): (32, 2.0)}
    slopes = {proxy.model: found.drift(name, kind, proxy)[0] for name, kind, proxy in found.lines}
    assert slopes == {"gpt-32": pytest.approx(-1), "llama-32": pytest.approx(1)}
    assert found.optima("adamw", "mup", Regime("llama-32", 4)) == [(32, 2.0), (64, 4.0)]
