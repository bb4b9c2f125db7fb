"""What one rank ends by ends the other one too: with its code, at once, said once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opt.training import failing
from tests.training import ranks_that_end

JOBS = {  # name -> exit codes of both ranks, what is said once
    "before they meet": ([2, 2], "job [rank 1]: the data is not there"),
    "alike": ([2, 2], "the data is not there"),
    "in a step": ([2, 2], "job [rank 0]: the disk is full"),
    "exception": ([1, 1], "RuntimeError: out of memory"),
    "well": ([0, 0], ""),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], float, str]]:
    root, folder = Path(__file__).parents[2], str(tmp_path_factory.mktemp("ranks"))
    command = [sys.executable, "-m", "tests.training.ranks_that_end", folder, *JOBS]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", JOBS)
def test_both_ranks_end(outcomes: dict[str, tuple[list[int], float, str]], name: str) -> None:
    wanted, sentence = JOBS[name]
    codes, seconds, said = outcomes[name]
    assert codes == wanted and seconds < ranks_that_end.LIMIT / 2, (codes, seconds, said)
    assert not sentence or said.count(sentence) == 1, said


def test_one_process_has_nobody_to_tell() -> None:
    failing.listen()
    assert failing.tell(2, "no such file") == (2, True)
