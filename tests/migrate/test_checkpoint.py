"""Checkpoints of Megatron's own AdamW (TP2 × PP2) made into warm starts on other layouts, by whole runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.migrate.runs import ADAM, FLAGS, STOP, convert, launch, losses, tensors, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm")


@pytest.fixture(scope="module")
def source(folder: Path) -> dict[int, float]:
    flags = ["--optimizer", "adam", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", *ADAM]
    flags += ["--save", str(folder / "adam"), "--save-interval", str(STOP)]
    return losses(launch("megatron_opt.pretrain", 4, flags, folder))


@pytest.fixture(scope="module")
def adamw(folder: Path, source: dict[int, float]) -> str:
    return convert(folder, "adam", "adamw", 1, "--optimizer", "adamw", *ADAM)


@pytest.fixture(scope="module")
def muon(folder: Path, source: dict[int, float]) -> str:
    layout = ["--use-distributed-optimizer"]
    return convert(folder, "adam", "muon", 2, "--optimizer", "muon", *layout)


def test_our_adamw_goes_on_as_megatrons_would_have(folder: Path, source: dict[int, float], adamw: str) -> None:
    flags = ["--optimizer", "adamw", *ADAM, "--load", str(folder / "adamw"), "--tensor-model-parallel-size", "2"]
    going_on = losses(launch("megatron_opt.pretrain", 2, [*flags, "--override-opt_param-scheduler"], folder))
    assert sorted(going_on) == list(range(STOP + 1, 17))
    del going_on[STOP + 2]  # Megatron logs the mean of a run's first two losses there
    for number, loss in going_on.items():
        assert loss == pytest.approx(source[number], rel=1e-5), number


def test_weights_are_the_same_bit_for_bit(folder: Path, adamw: str, muon: str) -> None:
    before = weights(folder / "adam")
    assert len(before) > 5
    for name in ("adamw", "muon"):
        after = weights(folder / name)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
    assert "the schedule counts from here" in muon


def test_muons_momentum_is_adams_at_its_scale_and_comes_back(folder: Path, adamw: str, muon: str) -> None:
    convert(folder, "muon", "back", 1, "--optimizer", "adamw", *ADAM)
    mine = tensors(folder / "adamw", "optimizer.state.exp_avg.")
    buffers = tensors(folder / "muon", "optimizer.state.momentum_buffer.")
    back = tensors(folder / "back", "optimizer.state.exp_avg.")
    assert len(buffers) == 4 * 7  # q, k, v, projection, gate, up, down of four layers
    for key, buffer in buffers.items():
        m = mine[key.replace("momentum_buffer", "exp_avg")]
        torch.testing.assert_close(buffer * (1 - 0.98), m, rtol=1e-6, atol=0)
    assert back.keys() == mine.keys()
    for key, value in mine.items():
        torch.testing.assert_close(back[key], value, rtol=1e-5, atol=1e-12)


def test_warm_muon_trains_on_without_a_spike(folder: Path, source: dict[int, float], muon: str) -> None:
    flags = ["--optimizer", "muon", "--load", str(folder / "muon"), "--override-opt_param-scheduler"]
    going_on = losses(launch("megatron_opt.pretrain", 1, flags, folder))
    resting = losses(launch("megatron_opt.pretrain", 1, [*flags, "--lr", "1e-12"], folder))
    for number, loss in going_on.items():  # beside the same weights on the same batches: batches differ by 2%
        assert loss <= 1.01 * resting[number], number
    assert going_on[16] < min(resting[16], source[STOP])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "muon", "--load", "{0}/nowhere", "--save", "{0}/x"], "holds no checkpoint"),
        (["--optimizer", "muon", "--load", "{0}/adam", "--save", "{0}/adam"], "are both"),
        (["--optimizer", "muon", "--load", "{0}/adam"], "--load and"),
        (["--optimizer", "adam", "--load", "{0}/adam", "--save", "{0}/x"], "Megatron's own"),
        (["--optimizer", "muon", "--load", "{0}/adam", "--save", "{0}/x", "--ckpt-step", "7"], "iter_0000007"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    folder: Path, source: dict[int, float], flags: list[str], message: str
) -> None:
    words = [word.format(folder) for word in flags]
    command = [sys.executable, "-m", "megatron_opt.cli", "migrate", "checkpoint", *FLAGS, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "x" / "latest_checkpointed_iteration.txt").exists()
