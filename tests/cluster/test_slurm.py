"""examples/slurm.sbatch on a real two-node Slurm: warned, preempted, an array; the losses of an undisturbed run."""

import sys
import time

import pytest

from tests.cluster import slurm
from tests.cluster.conftest import LIMIT, flags_of
from tests.cluster.harness import ROOT, Run, compare, losses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := slurm.missing():
        pytest.skip(why)
    made = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def submit(cluster, bench, request, tmp_path):
    """Submit the example with the tests' small model in place of a scale; (job, run to look at)."""
    command = tmp_path / "bin" / "megatron-opt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_opt.cli "$@"\n')
    command.chmod(0o755)
    jobs = []

    def start(*options, more=(), name="", arguments=(), **environment):
        folder = bench / (name or f"{request.node.name}-{len(jobs)}")
        folder.mkdir()
        examples = tmp_path / f"examples-{len(jobs)}"
        (examples / "layouts").mkdir(parents=True)
        words = " ".join(f"'{word}'" for word in [*more, *flags_of(folder)])
        (examples / "layouts" / "tiny.sh").write_text(f"layout=({words})\n")
        (examples / "run_flags.sh").write_text("run=()\n")
        job = cluster.run(
            "sbatch", "--parsable", "--nodes=2", "--partition=low", f"--output={folder}/log", *options,
            str(ROOT / "examples" / "slurm.sbatch"), "tiny", *arguments, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
            PATH=f"{command.parent}:{slurm._path()}", **{"EXAMPLES": str(examples), "RANKS": "1", **environment},
        )  # fmt: skip
        jobs.append(job)
        return job, Run(folder, [])

    yield start
    for job in jobs:
        cluster.run("scancel", job)


def ended(cluster, job, run):
    """Wait for the job's last state."""
    deadline = time.monotonic() + LIMIT
    while (state := cluster.job_state(job)) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        assert time.monotonic() < deadline, f"{state}\n{run.tail()}\n{cluster.log('ctld')}"
        time.sleep(0.5)
    return state


def steps(run, count):
    run.until(lambda: run.iteration() >= count, LIMIT, f"{count} steps")


def test_a_warning_saves_and_the_job_requeues_itself(cluster, submit, reference):
    job, run = submit()
    steps(run, 5)
    cluster.run("scancel", "--signal=USR1", job)  # what --signal does before the time limit
    assert ended(cluster, job, run) == "COMPLETED", run.tail()
    assert run.events("signal")[0]["signal"] == "SIGUSR1" and "requeueing" in run.tail(1000)
    assert run.events("restart")[-1]["slurm_job"] == job
    assert compare(reference, losses(run.folder)) == []


def test_a_preempted_job_saves_and_is_requeued(cluster, submit, reference):
    job, run = submit()
    steps(run, 5)
    other = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap", "true")
    run.until(lambda: run.events("signal"), LIMIT, "the signal")
    assert ended(cluster, job, run) == "COMPLETED", run.tail()
    assert cluster.job_state(other) == "COMPLETED"
    assert run.events("signal")[0]["signal"] == "SIGTERM"
    assert compare(reference, losses(run.folder)) == []


def test_at_the_time_limit_the_job_saves_and_goes_on_in_a_new_one(cluster, submit, reference):
    """Two minutes, and Slurm's own warning between one minute and two before their end; the run needs more than one."""
    slow = {"SLOW_RANK": "1", "SLOW_FROM": "0", "SLOW_SECONDS": "0.25"}  # four microbatches a step
    job, run = submit("--time=2", "--signal=USR1@60", more=("--module", "tests.cluster.slow"), **slow)
    assert ended(cluster, job, run) == "COMPLETED", run.tail()
    warned = run.events("signal")
    assert warned and {entry["signal"] for entry in warned} == {"SIGUSR1"}
    assert len(run.events("restart")) >= len(warned)
    assert compare(reference, losses(run.folder)) == []


def test_a_failed_node_has_its_job_requeued_and_resumed(cluster, submit, reference):
    """A node dies without a word: Slurm notices, requeues, and starts the job again once there are two nodes."""
    slow = {"SLOW_RANK": "0", "SLOW_FROM": "0", "SLOW_SECONDS": "0.1"}
    job, run = submit(more=("--module", "tests.cluster.slow"), **slow)
    run.until(lambda: run.events("save") and run.iteration() >= 12, LIMIT, "a checkpoint")
    cluster.fail("n2")
    try:
        run.until(lambda: cluster.job_state(job) in ("PENDING", "REQUEUED"), LIMIT, "the requeueing")
    finally:
        cluster.restore("n2")
    assert ended(cluster, job, run) == "COMPLETED", run.tail()
    assert run.events("restart")[-1]["slurm_job"] == job and run.events("resume")[-1]["iteration"] >= 10
    assert compare(reference, losses(run.folder)) == []


def test_an_array_of_jobs_keeps_to_itself(cluster, submit, bench):
    """Two tasks of one node each: %a in folders and flags is the task's number."""
    options = ("--array=1-2", "--nodes=1", f"--output={bench}/array-%a.log")
    job, _ = submit(*options, name="array-%a", arguments=("--seed", "%a", "--train-iters", "8"), RANKS="2")
    deadline = time.monotonic() + LIMIT
    while cluster.run("squeue", "--noheader", "--job", job):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-3000:] for path in bench.glob("array-*.log"))
    first, second = (losses(bench / f"array-{task}") for task in (1, 2))
    assert len(first) == len(second) == 9 and first != second, logs
