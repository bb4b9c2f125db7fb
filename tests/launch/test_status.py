"""`megatron-opt status`: reads what a run writes, at any moment of it."""

import json
import os
import subprocess
import sys

import pytest

from megatron_opt import status
from megatron_opt.errors import UserError

START = {"event": "start", "rank": 0, "train_iters": 100, "world_size": 4}


@pytest.fixture
def folder(tmp_path):
    """A run's folder, written piece by piece."""

    def write(name, *rows):
        with (tmp_path / name).open("a") as stream:
            for row in rows:
                stream.write(row if isinstance(row, str) else json.dumps({"time": 1000.0, **row}) + "\n")
        return tmp_path

    return write


def train(iteration, **more):
    return {"kind": "train", "iteration": iteration, "loss": 5.0, "step_time": 0.5, "tokens_per_s": 2000.0, **more}


def now(folder):
    return max(path.stat().st_mtime for path in folder.glob("*.jsonl"))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        status.look(tmp_path)


def test_before_the_first_step(folder):
    run = folder("events.jsonl", START)
    found = status.look(run, now(run))
    assert (found.state, found.iteration, found.train_iters, found.checkpoint) == ("starting", None, 100, None)
    assert "step         ? of 100" in status.table(found)


def test_a_running_run(folder, tmp_path):
    save = tmp_path / "checkpoints"
    for name in ("iter_0000010", "iter_0000020", "iter_0000030.damaged", ".saving"):
        (save / name).mkdir(parents=True)
    run = folder("events.jsonl", {**START, "save": str(save)}, {"event": "save", "iteration": 20})
    evaluation = {"kind": "eval", "iteration": 20, "loss": 4.5, "split": "valid"}
    folder("metrics.jsonl", train(20), evaluation, train(21), '{"kind": "tr')
    found = status.look(run, now(run) + 3)
    assert found.state == "running" and found.iteration == 21 and found.checkpoint == 20
    assert found.seconds_left == pytest.approx(79 * 0.5) and found.valid_loss == 4.5
    text = status.table(found)
    assert "21 of 100 (21.0%)" in text and "2,000 tokens/s on 4 ranks" in text and "0:00:39" in text


def test_troubles_are_counted(folder):
    run = folder(
        "events.jsonl",
        START,
        {"event": "hang", "guilty": [3], "iteration": 5},
        {**START, "event": "restart"},
        {"event": "damaged", "iteration": 9, "reason": "x does not match"},
    )
    folder("metrics.jsonl", train(9))
    found = status.look(run, now(run))
    assert found.restarts == 1 and found.counts == {"hang": 1, "damaged": 1}
    assert found.last_trouble == "damaged at iteration 9: x does not match"


def test_silence_and_ends_are_told_apart(folder):
    run = folder("events.jsonl", START)
    folder("metrics.jsonl", train(9))
    assert status.look(run, now(run) + 59).state == "running"
    assert status.look(run, now(run) + 61).state == "silent"
    folder("events.jsonl", {"event": "signal", "signal": "SIGTERM"})
    assert status.look(run, now(run)).state == "left on SIGTERM"
    (run / "results.json").write_text('{"status": "diverged"}')
    assert status.look(run, now(run)).state == "diverged"
    folder("events.jsonl", {**START, "event": "restart"}, {"event": "failed", "code": 1})
    assert status.look(run, now(run)).state == "failed with exit code 1"


def test_the_command_needs_no_torch_and_ends_with_the_run(folder):
    run = folder("events.jsonl", START)
    folder("metrics.jsonl", train(100))
    (run / "results.json").write_text('{"status": "completed"}')
    code = (
        "import sys; from megatron_opt import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(run), "--json", "--watch", "0.1"],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "completed"
