"""The cost model's speedup is the study's one prediction over the ratio of step times."""

import json

import pytest

from megatron_opt.cli import main
from megatron_opt.study.fits.statement import predict
from megatron_opt.study.prediction import load

STEP = "cost step --cluster h100 --gpus 1 --preset llama-130m --num-layers 2 --bf16 --optimizer muon".split()


def test_the_speedup_is_the_studys_prediction_over_the_ratio_of_steps(tmp_path, capsys):
    rows = [
        {"optimizer": name, "parameters": n, "tokens": 20 * r * n, "loss": loss(name, n, 20 * r * n)}
        for n in (1e6, 2e6, 4e6)
        for r in (1, 2, 4)
        for name in ("adamw", "muon")
    ]
    fits = tmp_path / "fits.json"
    fits.write_text(json.dumps({"name": "mine", "baseline": "adamw", "noise": {"sigma": 1e-3}, "observations": rows}))
    out = tmp_path / "step.json"
    words = [*STEP, "--against", "adamw", "--study", str(fits), "--chinchilla", "4"]
    assert main([*words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    n = float(found["non_embedding_parameters"])
    said = predict(load(fits).law(), "muon", n, 80 * n).speedup
    speed = found["speedup"]
    assert speed["token_speedup"] == {"value": said.value, "low": said.low, "high": said.high}
    assert speed["step_time_ratio"] > 1 and said.value == pytest.approx(1.1, abs=0.03)
    assert speed["wall_clock_speedup"]["value"] == pytest.approx(said.value / speed["step_time_ratio"])
    shown = capsys.readouterr().out
    assert (
        f"{said.value:.2f} ({said.low:.2f} to {said.high:.2f}) times the tokens" in shown
        and "2.1 times the largest" in shown
    )
    assert main([*words[:-5], "soap", *words[-4:]]) == 2 and "mine has no results of soap" in capsys.readouterr().err
    assert main([*STEP, "--study", str(fits)]) == 2 and "--study is given without --against" in capsys.readouterr().err


def loss(name, n, d):
    return 1.7 + 400 * n**-0.34 + 410 * (d * (1.1 if name == "muon" else 1.0)) ** -0.28
