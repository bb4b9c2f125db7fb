"""Steps to a target loss: the track's rule, its published results, the table, and the small twin's file."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.study.cli import main
from megatron_opt.study.commands import speedrun
from megatron_opt.study.fits.steps_to_target import NORMAL_QUANTILE, TRACK_MARGIN, steps_to_target

EXAMPLE = Path(__file__).parents[2] / "examples" / "speedrun"


def test_one_run_and_four_at_the_tracks_own_examples() -> None:
    """ "for a single run, any val loss below 3.276 suffices, and for n=4 runs, any average below 3.278"."""
    assert pytest.approx(0.004, rel=5e-3) == NORMAL_QUANTILE * 0.0013
    assert steps_to_target([[(100, 3.276)]], 3.28).steps == 100
    assert steps_to_target([[(100, 3.2761)]], 3.28).steps is None
    four = [[(100, loss)] for loss in (3.277, 3.279, 3.2775, 3.2785)]
    assert steps_to_target(four, 3.28).steps == 100
    assert steps_to_target([*four[:3], [(100, 3.2787)]], 3.28).steps is None


def test_one_step_is_chosen_for_all_runs() -> None:
    first = [(25, 3.30), (50, 3.279), (75, 3.27), (100, 3.26)]
    second = [(25, 3.31), (50, 3.281), (75, 3.28), (100, 3.27), (110, 3.2)]
    found = steps_to_target([first, second], 3.28)
    assert (found.steps, found.runs) == (75, 2)  # at 50 the mean is 3.28: no evidence
    assert found.loss == pytest.approx(3.275) and found.evidence == pytest.approx(0.005 * math.sqrt(2))
    assert found.spread == pytest.approx(0.01 / math.sqrt(2))
    assert found.crossing == pytest.approx(50)
    ends = steps_to_target([first, second], 3.0)
    assert ends.steps is None and ends.loss == pytest.approx(3.265) and ends.crossing is None


def test_runs_of_other_schedules_are_refused() -> None:
    with pytest.raises(UserError, match="no evaluation at the same step"):
        steps_to_target([[(25, 3.0)], [(30, 3.0)]], 3.28)


def test_published_results_hold_by_the_rule() -> None:
    protocol = speedrun.read_protocol(EXAMPLE / "track3.yaml")
    assert (protocol["target"], protocol["margin"]) == (3.28, TRACK_MARGIN)
    steps = {one["optimizer"].split(",")[0]: one["steps"] for one in protocol["published"]}
    assert steps["Muon"] == 3250 and steps["SOAP-Muon"] == 2690
    for one in protocol["published"]:
        found = steps_to_target([[(one["steps"], one["loss"])]] * one["runs"], 3.28)
        assert (found.steps is not None) == ("undertuned" not in one["optimizer"]), one


def test_the_table_leaves_setups_without_runs_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, loss in enumerate((3.27, 3.272)):
        folder = tmp_path / "muon" / str(seed)
        folder.mkdir(parents=True)
        rows = [{"kind": "eval", "iteration": step, "loss": at} for step, at in ((0, 10.0), (3250, loss))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["speedrun", str(EXAMPLE / "track3.yaml"), str(tmp_path)], "megatron-opt study") == 0
    lines = capsys.readouterr().out.splitlines()
    (ours,) = (line for line in lines if line.startswith("│ muon "))
    assert "3250" in ours and "3.2710" in ours and "0.0127" in ours
    (other,) = (line for line in lines if line.startswith("│ soap_muon "))
    assert "not run" in other


def test_what_is_no_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        speedrun.read_protocol(tmp_path / "nothing.yaml")
    (tmp_path / "p.yaml").write_text("name: x\ntarget: 3.28\n")
    with pytest.raises(UserError, match="has no margin"):
        speedrun.read_protocol(tmp_path / "p.yaml")


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("speedrun_train", EXAMPLE / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_the_tracks() -> None:
    """12 layers of width 768 with biases and gains; logits capped at 15; attention looks back only."""
    script = _script()
    with torch.device("meta"):
        whole = script.Model(**speedrun.read_protocol(EXAMPLE / "track3.yaml")["model"])
    hidden = 12 * (4 * (768 * 768 + 768) + 2 * 4 * 768 * 768 + 4 * 768 + 768 + 2 * 768)
    assert sum(p.numel() for p in whole.parameters()) == hidden + 2 * 50304 * 768 + 50304 + 2 * 768
    torch.manual_seed(0)
    model = script.Model(32, 1, 16, 8)
    tokens = torch.randint(0, 32, (2, 6))
    assert model(tokens, tokens).item() == pytest.approx(12 * math.log(32), rel=1e-6)  # logits begin at zero
    torch.nn.init.normal_(model.output.weight)
    torch.nn.init.normal_(model.blocks[0].attention.proj.weight)
    counted = tokens.clone()
    counted[:, -1] = -100  # this position has no loss
    losses = [model(tokens, counted).item()]
    for position in (-1, 0):
        other = tokens.clone()
        other[:, position] = (other[:, position] + 1) % 32
        losses.append(model(other, counted).item())
    assert losses[1] == losses[0] != losses[2]


@pytest.mark.parametrize("name", ["track3", "twin"])
def test_every_setups_groups_take_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_opt.torch import Optimizer

    script, protocol = _script(), speedrun.read_protocol(EXAMPLE / f"{name}.yaml")
    model = script.Model(64, 1, 16, 8)
    for setup in protocol["setups"].values():
        made = Optimizer(model, groups=setup["groups"], lr=setup["lr"])
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).backward()
        made.step()


def test_a_short_twin_learns(tmp_path: Path) -> None:
    """Both ranks' data are one: batches are the file's tokens in order."""
    script, protocol = _script(), speedrun.read_protocol(EXAMPLE / "twin.yaml")
    import numpy as np

    draw = np.random.default_rng(0)
    words = (np.cumsum(draw.integers(0, 3, 6000)) % 32).astype(np.uint16)
    words.tofile(tmp_path / "text.bin")
    small = protocol | {
        "model": {"vocabulary": 32, "layers": 1, "width": 16, "head": 8}, "train": f"{tmp_path}/text.bin",
        "valid": f"{tmp_path}/text.bin", "sequence_length": 16, "batch_tokens": 128, "valid_tokens": 512,
    }  # fmt: skip
    for name, setup in protocol["setups"].items():
        script.run(small, setup | {"steps": 30}, 0, tmp_path / name / "0")
        (curve,) = speedrun.curves_of(tmp_path / name)
        assert curve[0] == (0, pytest.approx(math.log(32), rel=1e-5)) and curve[-1][0] == 30
        assert curve[-1][1] < curve[0][1] - 0.5, name
