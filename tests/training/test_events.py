"""The event log: whole lines from many writers, no harm from a full disk."""

import json
import subprocess
import sys

import pytest

from megatron_opt import run_files
from megatron_opt.training import events


@pytest.fixture(autouse=True)
def _closed():
    yield
    events.open_log(None)


def test_round_trip(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    events.open_log(tmp_path / "run")
    events.record("save", iteration=10, seconds=0.5)
    (entry,) = events.read(tmp_path / "run")
    assert (entry["event"], entry["rank"], entry["restart"], entry["iteration"]) == ("save", 3, 3, 10)


def test_a_torn_last_line_is_left_out(tmp_path):
    events.open_log(tmp_path)
    events.record("start")
    with (tmp_path / run_files.EVENTS).open("a") as stream:
        stream.write('{"event": "sa')
    assert [entry["event"] for entry in events.read(tmp_path)] == ["start"]


def test_nothing_is_written_without_a_folder_and_a_vanished_one_does_no_harm(tmp_path):
    events.open_log(None)
    events.record("start")
    folder = tmp_path / "run"
    events.open_log(folder)
    folder.rmdir()
    events.record("start")
    assert not folder.exists()


def test_lines_of_many_writers_stay_whole(tmp_path):
    code = (
        "import sys; from megatron_opt.training import events; events.open_log(sys.argv[1])\n"
        "for i in range(200): events.record('step', i=i, text='x' * 300)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    lines = (tmp_path / run_files.EVENTS).read_text().splitlines()
    assert len(lines) == 800 and all(json.loads(line)["event"] == "step" for line in lines)
