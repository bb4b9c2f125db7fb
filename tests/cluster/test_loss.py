"""Losses that jump: left out, or gone back from with the data skipped, as configured."""

import pytest

from tests.cluster.conftest import ITERATIONS, LIMIT
from tests.cluster.harness import losses

LAUNCHER = ("--nproc-per-node", "2", "--max-restarts", "5", "--module", "tests.cluster.spiky")


def spiked(job, tmp_path, at, factor, *more):
    env = {"SPIKE_AT": str(at), "SPIKE": factor, "SPIKE_MARK": str(tmp_path / "spiked")}
    run = job(*more, launcher=LAUNCHER, env=env)
    assert run.finish(LIMIT) == 0, run.tail()
    assert (tmp_path / "spiked").exists()
    return run


@pytest.mark.parametrize("factor", ["5", "nan"])
def test_skip_leaves_the_update_out(job, tmp_path, reference, factor):
    run = spiked(job, tmp_path, 23, factor, "--on-loss-spike", "skip")
    (skip,) = run.events("skip")
    assert skip["iteration"] == 23 and skip["count"] == 1
    got = losses(run.folder)
    assert all(got["train", n][0] == reference["train", n][0] for n in range(1, 23))
    assert all(got["train", n][0] < 1.5 * reference["train", n][0] for n in range(24, ITERATIONS + 1))
    assert got["train", 24] != reference["train", 24]


def test_rollback_goes_back_and_skips_the_data(job, tmp_path, reference):
    run = spiked(job, tmp_path, 23, "50", "--on-loss-spike", "rollback", "--rollback-steps", "5")
    (back,) = run.events("rollback")
    assert (back["iteration"], back["to"]) == (23, 15)
    assert run.events("resume")[0]["iteration"] == 15
    got = losses(run.folder)
    assert all(got["train", n] == reference["train", n] for n in range(1, 16))
    assert got["train", 24][0] < 1.5 * reference["train", 24][0]
    assert run.iteration() == ITERATIONS
