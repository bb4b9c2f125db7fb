"""What Megatron's and torch's imports say of a machine without a GPU reaches no user: commands that work write nothing to stderr."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import apart
from tests.cluster.harness import environment, job_flags
from tests.evaluation import models

COMMANDS = {
    "doctor": "doctor --megabytes 1",
    "export": "export CHECKPOINTS --output EXPORTED --tokenizer TOKENIZER",
    "import": "import EXPORTED --output BACK",
    "generate": "generate CHECKPOINTS --prompt cell --max-new-tokens 2 --tokenizer TOKENIZER",
    "eval": "eval CHECKPOINTS --tasks arc_easy --tasks-path DATA --tokenizer TOKENIZER --limit 4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("quiet")
    (home / "cuda").mkdir()
    models.checkpoint(home)
    models.data(home / "data", items=8)
    return home


def _stderr(module: str, words: list[str], folder: Path) -> str:
    """What the command says there, on a machine with CUDA's toolkit and no GPU."""
    env = environment(CUDA_HOME=str(folder / "cuda"), CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] += os.pathsep + apart.FOLDER
    done = subprocess.run([sys.executable, "-m", module, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", COMMANDS)  # in this order: import reads what export has written
def test_a_command_that_works_says_nothing_on_stderr(command: str, folder: Path) -> None:
    if command == "eval":
        apart.lm_eval()
    paths = {"CHECKPOINTS": "checkpoints", "TOKENIZER": "tokenizer.json", "DATA": "data"}
    paths |= {"EXPORTED": "exported", "BACK": "back"}
    words = [str(folder / paths[word]) if word in paths else word for word in COMMANDS[command].split()]
    assert _stderr("megatron_opt.cli", words, folder) == ""


def test_a_run_says_nothing_on_stderr(folder: Path) -> None:
    flags = [*job_flags(folder / "run", 2), "--lr-warmup-iters", "0"]
    assert _stderr("megatron_opt.pretrain", [*flags, "--optimizer", "adamw"], folder) == ""
    log = (folder / "run" / "logs" / "rank-0.txt").read_text()
    assert not [line for line in log.splitlines() if "CUDA runtime" in line or "Warning: " in line]
