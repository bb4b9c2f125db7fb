"""A run that was stopped and went on has the results of one left alone; its final loss hangs on no interval."""

import json
import re
import shutil

import pytest

from megatron_opt import run_files, status
from tests.training.test_job import read, run

COUNTS = "status diverged tokens iterations final_train_loss final_valid_loss final_test_loss validation".split()
ALIKE = ["--optimizer", "adamw", "--dataloader-type", "single", "--log-interval", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *ALIKE, "--eval-interval", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    return read(folder)


def test_stopped_and_resumed(whole, tmp_path):
    flags = [*ALIKE, "--save", str(tmp_path / "ck"), "--load", str(tmp_path / "ck"), "--save-interval", "4"]
    flags += ["--eval-interval", "3"]
    done = run(tmp_path, *flags, "--exit-interval", "5")
    assert done.returncode == 0, done.stderr[-3000:]
    result, rows = read(tmp_path)
    assert (result["status"], result["reason"], result["iterations"]) == ("interrupted", "--exit-interval 5", 5)
    assert status.look(tmp_path / "out").state == "interrupted: --exit-interval 5"
    # killed after step 5, as if the checkpoint of step 5 had not been written
    shutil.rmtree(tmp_path / "ck" / "iter_0000005")
    (tmp_path / "ck" / "latest_checkpointed_iteration.txt").write_text("4")
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed, rows = read(tmp_path)
    undisturbed, other = whole
    assert {key: resumed[key] for key in COUNTS} == {key: undisturbed[key] for key in COUNTS}
    train = [(row["iteration"], row["loss"], row["tokens"]) for row in run_files.training(rows)]
    assert train == [(row["iteration"], row["loss"], row["tokens"]) for row in run_files.training(other)]
    _lines_are_of_their_own_steps(tmp_path / "out", done.stdout, run_files.training(rows))
    assert resumed["tokens_per_s"] == pytest.approx(resumed["tokens"] / resumed["train_time_s"])
    steps = [row["step_time"] for row in run_files.training(rows)]
    assert resumed["train_time_s"] == pytest.approx(sum(steps), rel=1e-6)
    assert status.look(tmp_path / "out").state == "completed"
    names = [entry["event"] for entry in run_files.events(tmp_path / "out")]
    assert names.count("end") == 2


def _lines_are_of_their_own_steps(out, console, rows):
    """The resumed process's first lines, ours and Megatron's, which would keep its first step for the next line."""
    losses = {row["iteration"]: row["loss"] for row in rows}
    ours = [line.split() for line in console.splitlines() if re.match(r" +\d+/6 ", line)]
    assert [(words[0], words[1]) for words in ours] == [(f"{step}/6", f"{losses[step]:.4f}") for step in (5, 6)]
    log = (out / "logs" / "rank-0.txt").read_text()
    theirs = re.findall(r"iteration +(\d+)/ +6 .*?lm loss: ([\d.E+-]+)", log)[-2:]
    assert theirs == [(str(step), f"{losses[step]:.6E}") for step in (5, 6)]


def test_a_refused_start_is_not_a_result(tmp_path):
    done = run(tmp_path, "--optimizer", "adamw", "--load", str(tmp_path / "ck"), "--ckpt-step", "7")
    assert done.returncode == 2
    assert status.look(tmp_path / "out").state.startswith("refused: ")
    record = json.loads((tmp_path / "out" / run_files.CONFIG).read_text())
    assert record["groups"][0]["options"]["beta2"] == 0.98, "what was to be trained is known of a run without results"
