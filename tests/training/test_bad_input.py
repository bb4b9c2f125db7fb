"""Bad input ends with exit code 2 and one sentence that names the cause and the remedy, on every rank, soon."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.distributed.pool import write_dataset

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 2 --train-iters 2 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 127 "
    "--eval-iters 0 --eval-interval 100 --attention-dropout 0 --hidden-dropout 0"
).split()
WITHOUT_DATA = {
    "no model": (["--lr", "1e-3"], "--num-layers is missing"),
    "no learning rate": (["--preset", "llama-130m", "--mock-data"], "--lr is missing"),
    "unknown preset": (["--preset", "nope"], "there is no preset 'nope'; there are"),
    "unknown optimizer": ([*MODEL, "--mock-data", "--optimizer", "adamax"], "--optimizer adamax is none of"),
    "unknown flag": ([*MODEL, "--mock-data", "--learning-rate", "1"], "--learning-rate"),
    "flag value": ([*MODEL, "--mock-data", "--train-iters", "many"], "invalid int value: 'many'"),
    "option value": ([*MODEL, "--mock-data", "--optimizer", "muon", "--muon-momentum", "1.5"], "momentum is 1.5"),
    "option of another optimizer": (
        [*MODEL, "--mock-data", "--optimizer", "adamw", "--muon-momentum", "0.9"], "no parameter is trained by muon"),
    "blockwise": ([*MODEL, "--mock-data", "--optimizer", "muon", "--muon-tp-mode", "blockwise"], "--muon-tp-mode"),
    "context parallelism": ([*MODEL, "--mock-data", "--context-parallel-size", "2"], "give --transformer-impl"),
    "layout": ([*MODEL, "--mock-data", "--tensor-model-parallel-size", "2"], "1 ranks are not divisible"),
    "heads": ([*MODEL, "--mock-data", "--num-attention-heads", "5"], "not divisible by --num-attention-heads 5"),
    "fp16": ([*MODEL, "--mock-data", "--optimizer", "muon", "--fp16"], "--fp16 does not work with --optimizer muon"),
    "warm-up": ([*MODEL, "--mock-data", "--lr-warmup-iters", "2"], "--lr-warmup-iters 2 is not below the 2 iters"),
    "writer of saves": ([*MODEL, "--mock-data", "--save", "x", "--async-save", "--async-strategy", "nvrx"], "--async-strategy nvrx"),
    "groups file": ([*MODEL, "--mock-data", "--optimizer", "adamw", "--optimizer-groups", "none.yaml"], "none.yaml"),
}  # fmt: skip


def pretrain(flags, ranks=1, cwd=None):
    """(exit code, standard error) of a run; a hang fails the test."""
    command = [sys.executable, "-m", "megatron_opt.pretrain", *flags]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *launcher, "-m", "megatron_opt.pretrain", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return done.returncode, done.stderr


def assert_refused(flags, message, cwd=None):
    code, stderr = pretrain(flags, cwd=cwd)
    said = [line for line in stderr.splitlines() if line.startswith("megatron_opt.pretrain")]
    assert code == 2 and len(said) == 1, stderr[-2000:]
    assert message in said[0]
    assert "Traceback" not in stderr


@pytest.mark.parametrize("case", WITHOUT_DATA)
def test_flags(case, tmp_path):
    assert_refused(*WITHOUT_DATA[case], cwd=tmp_path)


@pytest.fixture
def prefix(tmp_path):
    return write_dataset(tmp_path / "text", documents=40)


def test_missing_dataset(tmp_path):
    assert_refused([*MODEL, "--train-data-path", str(tmp_path / "none")], "none")


def test_truncated_index(prefix):
    with open(f"{prefix}.idx", "r+b") as file:
        file.truncate(40)
    assert_refused([*MODEL, "--train-data-path", prefix], "text.idx")


def test_foreign_index(prefix):
    shutil.copy(__file__, f"{prefix}.idx")
    assert_refused([*MODEL, "--train-data-path", prefix], "text.idx")


def test_tokens_beyond_the_vocabulary(prefix):
    flags = [*MODEL, "--train-data-path", prefix]
    flags[flags.index("--vocab-size") + 1] = "63"
    flags += ["--make-vocab-size-divisible-by", "1"]
    assert_refused(flags, "vocabulary")


def test_every_rank_ends_with_one_code_and_one_says_why(tmp_path):
    code, stderr = pretrain(
        [*MODEL, "--train-data-path", str(tmp_path / "none"), "--tensor-model-parallel-size", "2"], ranks=2
    )
    said = [line for line in stderr.splitlines() if "megatron_opt.pretrain [rank" in line]
    assert code != 0 and len(said) == 1, stderr[-2000:]
    assert "exitcode  : 2" in stderr and "exitcode  : 1 " not in stderr


def test_a_rank_does_not_wait_for_one_that_has_refused(tmp_path):
    """As srun starts them, without an agent: rank 0 would wait at the meeting for --distributed-timeout-minutes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "megatron_opt.pretrain", *MODEL, "--mock-data"]
    ranks = [
        subprocess.Popen(
            [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, **meeting, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, more in enumerate(([], ["--lr", "fast"]))
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "megatron_opt.pretrain [rank 1]: --lr" in said[1] and "megatron_opt.pretrain" not in said[0]
