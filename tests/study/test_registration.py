"""Predictions are written before the runs, never replaced, never changed; scores and hypotheses on outcomes."""

import json

import numpy as np
import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.exchange import export_runs
from megatron_opt.study.fits.noise import noise_floor
from megatron_opt.study.fits.observations import observations
from megatron_opt.study.fits.statement import state
from megatron_opt.study.prediction import law_of
from megatron_opt.study.scoring import crps, score
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record, Store
from tests.study.test_verify import PHASES

WAITING = """\
name: waiting
sequence_length: 64
models:
  a: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
  b: {num_layers: 2, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 2}
data: {tokenizer: tokenizer.model, train: train, valid: valid}
defaults: {batch_size: 4}
optimizers:
  adamw: {grid: {lr: [0.008]}}
  muon: {grid: {lr: [0.016]}}
phases:
  - {kind: grid, regimes: [a@1x]}
  - {kind: predict, regimes: [b@1x], registered: true}
executor:
  jobs: 2
  command: [PYTHON, FAKE, "{flags}"]
"""
SIZES = {"s": 1e6, "m": 3e6, "l": 9e6, "xl": 3e7}


def test_runs_wait_for_their_prediction(make_study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_STEPS", "1")
    study, output = str(make_study(WAITING)), tmp_path / "out"
    assert cli.main(["run", study, "--output", str(output)], "study") == 1
    assert "b@1x wait for their predictions" in " ".join(capsys.readouterr().out.split())
    with Store(output / "study.sqlite") as store:
        assert {record.regime.model for record in store.runs()} == {"a"}
        store.set_meta("registered", [{"file": "elsewhere.json", "sha256": "", "written": "", "regimes": ["b@1x"]}])
    assert cli.main(["run", study, "--output", str(output)], "study") == 0
    with Store(output / "study.sqlite") as store:
        assert sum(record.regime.model == "b" for record in store.runs(status="completed")) == 2


def loss_of(optimizer: str, n: float, d: float) -> float:
    """Muon needs a tenth fewer tokens at any size."""
    return 1.7 + 400 * n**-0.34 + 410 * (d * (1.1 if optimizer == "muon" else 1.0)) ** -0.28


def rows(models, ratios=(1, 2, 4), changed=0.0) -> str:
    lines = ["optimizer,model,ratio,parameters,tokens,loss,hyper"]
    for model in models:
        for ratio in ratios:
            for optimizer in ("adamw", "muon"):
                n = SIZES[model]
                loss = loss_of(optimizer, n, 20 * ratio * n) + changed * (optimizer == "muon")
                lines.append(f"{optimizer},{model},{ratio},{n:.0f},{20 * ratio * n:.0f},{loss:.5f},{{}}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def known(tmp_path):
    """A study of three sizes, imported; the fourth is not run."""
    (tmp_path / "small.csv").write_text(rows(("s", "m", "l")))
    output = tmp_path / "out"
    assert cli.main(["import", str(output), str(tmp_path / "small.csv")], "study") == 0
    return output


def said(store: Store):
    """The law at the target, as `findings` states it."""
    dataset = from_store(store)
    law = law_of(observations(dataset), noise_floor(dataset))
    return dataset, state(law, *dataset.target, dataset.tokens_per_parameter)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_export_gives_the_same_law_where_it_is_imported(known, tmp_path, suffix):
    file, copy = tmp_path / f"runs.{suffix}", tmp_path / "copy"
    settings = {
        "name": "small",
        "tokens_per_parameter": 6.0,
        "target": [6e7, [1, 4]],
        "looks": 3,
        "margin": 0.01,
        "models": {"xl": 30_000_000},
        "to_register": ["xl@1x"],
        "trace": [{"kind": "transfer", "lr": 0.004}],
    }
    with Store(known / "study.sqlite") as store:
        for key, value in settings.items():
            store.set_meta(key, value)
        export_runs(store, file)
        dataset, statement = said(store)
    assert cli.main(["import", str(copy), str(file)], "study") == 0
    with Store(copy / "study.sqlite") as store:
        assert {key: store.meta(key) for key in settings} == settings
        again, same = said(store)
        assert same == statement and dataset.finished == again.finished
        assert cli.main(["import", str(copy), str(file)], "study") == 0
    other = tmp_path / "other"
    (tmp_path / "xl.csv").write_text(rows(("xl",)))
    assert cli.main(["import", str(other), str(tmp_path / "xl.csv")], "study") == 0
    with pytest.raises(UserError, match="1x is 6 tokens a parameter in the file and 20 in"):
        cli.main(["import", str(other), str(file)], "study")


def test_a_prediction_is_written_once_before_the_runs_and_scored_after(known, tmp_path, capsys):
    with pytest.raises(UserError, match="no regimes to predict"):
        cli.main(["predict", str(known)], "study")
    words = ["predict", str(known), "--regimes", "xl@1x", "xl@4x", "--models", "xl=3e7"]
    assert cli.main(words, "study") == 0
    file = known / "prediction.json"
    content, text = json.loads(file.read_text()), file.read_text()
    assert [row["regime"] for row in content["predictions"]] == ["xl@1x"] * 2 + ["xl@4x"] * 2
    muon = content["predictions"][1]
    assert muon["outcome_gain"]["law"]["low"] < muon["gain"]["value"] < muon["outcome_gain"]["law"]["high"]
    assert len(content["data"]["runs"]) == 18 and content["written"].startswith("20")
    with pytest.raises(UserError, match="is there already; a registered prediction is not replaced"):
        cli.main(words, "study")
    with pytest.raises(UserError, match="--models xl: write NAME=PARAMETERS"):
        cli.main(
            ["predict", str(known), "--regimes", "xl@1x", "--models", "xl", "--to", str(tmp_path / "e.json")], "study"
        )
    with pytest.raises(UserError, match="xxl@1x names no model"):
        cli.main(["predict", str(known), "--regimes", "xxl@1x", "--to", str(tmp_path / "e.json")], "study")

    (tmp_path / "large.csv").write_text(rows(("xl",), (1, 4)))
    assert cli.main(["import", str(known), str(tmp_path / "large.csv")], "study") == 0
    with pytest.raises(UserError, match="xl@1x has 4 started or finished runs"):
        cli.main([*words, "--to", str(tmp_path / "late.json")], "study")
    assert not (tmp_path / "late.json").exists()

    capsys.readouterr()
    assert cli.main(["verify", str(known)], "study") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 losses inside" in shown and "2 of 2 gains inside" in shown
    verdict = shown[shown.index("Which hypothesis won") :]
    # Gain .007 and assumed noise of .003: the data favour what is true, and say that they cannot rule out the rest.
    assert "kept" in verdict and "CRPS" in shown and "warning" not in shown

    file.write_text(text.replace('"study": "', '"study": "my '))
    with pytest.raises(UserError, match="was changed after it was written"):
        cli.main(["verify", str(known)], "study")
    file.write_text(text)
    with Store(known / "study.sqlite") as store:
        store.set_meta("registered", [])
    with pytest.raises(UserError, match="is not a prediction that was registered"):
        cli.main(["verify", str(known), "--prediction", str(file)], "study")


def test_a_gain_that_is_gone_is_seen_to_be_gone(known):
    """The outcome of a registered study in which Muon ends far above AdamW: outside, and the hypothesis of no gain wins."""
    assert cli.main(["predict", str(known), "--regimes", "xl@1x", "--models", "xl=3e7"], "study") == 0
    content = json.loads((known / "prediction.json").read_text())
    row = content["predictions"][1]
    centre = {key: np.median(one["quantiles"]) for key, one in row["outcome_gain"].items()}
    assert centre["vanished"] == pytest.approx(0, abs=5e-4) and centre["kept"] > 0.004 and centre["law"] > 0.004
    records = [record(content, name, loss_of("adamw", 3e7, 6e8) - 0.03) for name in ("adamw", "muon")]
    found = score(content, Dataset("x", "adamw", records))
    best = max(found.log_scores, key=found.log_scores.get)
    assert best == "vanished" and found.crps["vanished"] < min(found.crps["law"], found.crps["kept"])
    assert "no gain is left" in found.verdict(content["hypotheses"])
    assert score(content, Dataset("x", "adamw", records[:1])).missing == ("muon xl@1x (not run)",)


def record(content, optimizer, loss):
    said = next(row for row in content["predictions"] if row["optimizer"] == optimizer)
    return Record(
        id=optimizer, optimizer=optimizer, regime=Regime.parse(said["regime"]), seed=1, hyper={}, config={}, arguments=[],
        parameters=int(said["parameters"]), tokens=int(said["tokens"]), status="completed", attempts=1, interruptions=0,
        job=None, started=None, finished=None, loss=loss, results={}, reason=None,
    )  # fmt: skip


def test_crps_of_a_normal_sample_is_the_closed_form():
    """CRPS of N(0, 1) at y: y·(2Φ(y) − 1) + 2φ(y) − 1/√π (Gneiting and Raftery, 2007); 0 for a point at the outcome."""
    from scipy.stats import norm

    sample = norm.ppf((np.arange(4000) + 0.5) / 4000)
    for y in (0.0, 0.7, -2.0):
        expected = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)
        assert crps(sample, y) == pytest.approx(expected, abs=2e-3)
    assert crps(np.full(9, 0.3), 0.3) == pytest.approx(0, abs=1e-15) and crps(np.full(9, 0.3), 0.5) == pytest.approx(
        0.2
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ("kind: descent, regimes: [a@1x, a@4x, b@1x], registered: true", "is for a phase of kind predict"),
        ("kind: descent, regimes: [a@1x, a@4x, b@1x], optimizers: [adamw]", "takes muon from an earlier search"),
        (
            "kind: descent, regimes: [a@1x, a@4x, b@1x], optimizers: [adam]",
            "no optimizer 'adam'; there are adamw, muon",
        ),
    ],
)
def test_phases_of_some_optimizers(make_study, change, message):
    path = make_study(PHASES.replace("kind: descent, regimes: [a@1x, a@4x, b@1x]", change))
    with pytest.raises(UserError, match=message):
        cli.main(["plan", str(path)], "study")
    some = make_study(PHASES.replace("regimes: [d@1x, d@4x]}", "regimes: [d@1x], optimizers: [muon]}"))
    assert cli.main(["plan", str(some)], "study") == 0


def test_next_ranks_by_the_hour_and_names_the_cluster(known, capsys):
    words = ["next", str(known), "--optimizer", "muon", "--target", "1e9", "--cluster", "h100", "--top", "3"]
    assert cli.main([*words, "--by", "width"], "study") == 0
    wide = " ".join(capsys.readouterr().out.split())
    assert "muon's gain at 1e+09 parameters" in wide and "adamw and muon" in wide and "H100" in wide
    assert cli.main([*words, "--most-hours", "0.5"], "study") == 0
    assert " ".join(capsys.readouterr().out.split()) != wide
    with pytest.raises(UserError, match="has no gain of 'sgd'"):
        cli.main(["next", str(known), "--optimizer", "sgd"], "study")
