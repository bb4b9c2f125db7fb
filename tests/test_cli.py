"""The command line as a Unix tool."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opt.cli import main

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


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron-opt ")


@pytest.mark.parametrize(("words", "meant"), [
    (["optimzers"], "optimizers"), (["optimizers", "muno"], "muon"), (["study", "plna"], "plan"),
    (["data", "corpsu"], "corpus"), (["status", "x", "--wtach", "1"], "--watch"), (["cost", "serach"], "search"),
])  # fmt: skip
def test_a_typo_is_answered_with_what_was_meant(words, meant, capsys):
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and f"Did you mean {meant}?" in said


def test_optimizers_are_listed_with_their_flags(capsys):
    from megatron_opt.optimizers import registry

    assert main(["optimizers"]) == 0
    listed = capsys.readouterr().out
    for name, optimizer in registry.optimizers().items():
        assert f"\n{name} " in f"\n{listed}"
        assert main(["optimizers", name]) == 0
        one = capsys.readouterr().out
        for field, option in optimizer.Config.__dataclass_fields__.items():
            assert f"--{name}-{field}".replace("_", "-") + f"  (default {option.default}" in one
