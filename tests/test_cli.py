"""The command line as a Unix tool."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_output_to_nobody_ends_quietly_too(tmp_path):
    for words in (["--help"], ["status", "--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "megatron_opt.cli", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # argparse passes over its errors
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_leaves_ends_it_quietly(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"time": 1, "event": "start", "rank": 0}\n')
    command = [sys.executable, "-m", "megatron_opt.cli", "status", str(tmp_path), "--watch", "0.01"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.stdout.readline().startswith("state")
    run.stdout.close()
    assert (run.wait(60), run.stderr.read()) == (141, "")
    run.stderr.close()
