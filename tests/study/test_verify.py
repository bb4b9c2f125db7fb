"""A study in three phases through the command line, and its predictions beside the outcome."""

import json
import re

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli
from megatron_opt.study.store import Store

PHASES = """\
name: phases
sequence_length: 64
models:
  a: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
  b: {num_layers: 2, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 2}
  c: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}
  d: {num_layers: 2, hidden_size: 96, ffn_hidden_size: 192, num_attention_heads: 2}
ratios: [1, 4]
data: {tokenizer: tokenizer.model, train: train, valid: valid}
defaults: {batch_size: 4, weight_decay: 0.1}
optimizers:
  adamw: {start: {lr: 0.008}, grid: {lr: [0.004, 0.008, 0.016]}}
  muon: {start: {lr: 0.016}, grid: {lr: [0.008, 0.016, 0.032]}}
phases:
  - {kind: descent, regimes: [a@1x, a@4x, b@1x]}
  - {kind: restricted, regimes: [b@4x, c@1x, c@4x]}
  - {kind: predict, regimes: [d@1x, d@4x]}
target: {parameters: 2e5, ratios: [1, 4]}
executor:
  jobs: 4
  command: [PYTHON, FAKE, "{flags}"]
"""


@pytest.fixture
def finished(make_study, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_STEPS", "2")
    output = tmp_path / "out"
    assert cli.main(["run", str(make_study(PHASES)), "--output", str(output)], "study") == 0
    return output


def test_three_phases_predict_the_largest_size_and_verify_it(finished, capsys):
    with Store(finished / "study.sqlite") as store:
        phases, trace, records = store.phases(), store.meta("trace"), {r.id: r for r in store.runs()}
    assert set(phases) == {"descent", "restricted", "predict"} and len(phases["predict"]) == 4
    assert {str(records[run].regime) for run in phases["predict"]} == {"d@1x", "d@4x"}
    assert {step["kind"] for step in trace} >= {"sweep", "sensitivity", "prediction"}
    page = (finished / "report" / "index.html").read_text()
    assert ">Search</h2>" in page and "Hyperparameters of the target runs" in page
    capsys.readouterr()
    assert cli.main(["verify", str(finished)], "study") == 0
    shown = capsys.readouterr().out
    assert "predicted without d@1x, d@4x" in shown
    errors = {kind: float(error) for kind, error in re.findall(r"(\w+) law: error ([\d.]+)", shown)}
    assert (
        set(errors) == {"hierarchical", "shared", "separate"}
        and errors["hierarchical"] < 0.05
        and min(errors.values()) < 0.05
    )
    assert cli.main(["verify", str(finished), "--regimes", "c@4x"], "study") == 0
    with pytest.raises(UserError, match="no runs of z@1x; there are a@1x"):
        cli.main(["verify", str(finished), "--regimes", "z@1x"], "study")


def test_fit_writes_what_it_prints(finished, capsys):
    capsys.readouterr()
    assert cli.main(["fit", str(finished), "--resamples", "40"], "study") == 0
    shown = capsys.readouterr().out
    fits = json.loads((finished / "fits.json").read_text())
    assert fits["baseline"] == "adamw" and set(fits["laws"]) == {"shared", "separate"}
    assert len(fits["observations"]) == 16 and all(item["run"] for item in fits["observations"])
    assert {item["n"] for item in fits["extrapolations"]} == {2e5}
    best = fits["next_runs"]["muon"][0]
    assert best["shrinkage"] > 0 and f"{best['shrinkage']:.1%}" in shown
    # Only two budgets a size: speedups come from the hierarchical law, and say so.
    assert {item["method"] for item in fits["speedups"]} == {"joint"} and "hierarchical law" in shown
    assert cli.main(["status", str(finished), "--runs"], "study") == 0
    assert "completed" in capsys.readouterr().out
