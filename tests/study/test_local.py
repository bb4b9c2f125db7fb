"""The local executor: packing of cores and GPUs, locks, strays."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study.executors import Job, LocalExecutor, local
from megatron_opt.study.executors.base import RUN_VARIABLE, SINGLE, TORCHRUN, command_of, was_interrupted
from megatron_opt.study.spec import ExecutorSettings

SHOW = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES']); sys.stdout.flush(); import time; time.sleep(0.4)"
SLEEP = ExecutorSettings(jobs=1, command=(sys.executable, "-c", "import time; time.sleep(60)"))


def wait(executor, count=1, seconds=30):
    ended, end = [], time.monotonic() + seconds
    while len(ended) < count and time.monotonic() < end:
        ended += executor.poll()
        time.sleep(0.02)
    return ended


def test_gpus_are_shared_out_without_overlap(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    executor = LocalExecutor(ExecutorSettings(ranks=2, command=(sys.executable, "-c", SHOW)))
    assert executor.slots == 2
    jobs = [Job(name, tmp_path / name, []) for name in ("a", "b")]
    for job in jobs:
        executor.submit(job)
    assert {(one.run, one.code) for one in wait(executor, 2)} == {("a", 0), ("b", 0)}
    assert sorted((job.folder / "log.txt").read_text().strip() for job in jobs) == ["0,1", "2,3"]
    with pytest.raises(UserError, match="wants 8 GPUs and this machine has 4"):
        LocalExecutor(ExecutorSettings(ranks=8))
    with pytest.raises(UserError, match="do not fit"):
        LocalExecutor(ExecutorSettings(ranks=2, jobs=3))


def test_threads_are_the_cores_over_the_ranks(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local.shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for given, threads in (("", "4"), ("1", "1"), ("64", "4")):  # fewer where asked for: another study may run beside
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        executor = LocalExecutor(ExecutorSettings(ranks=2, jobs=2, environment={"MARK": "x"}))
        environment = executor._environment(Job("a", tmp_path, []), ())
        assert environment["OMP_NUM_THREADS"] == threads and environment["MARK"] == "x"
    assert LocalExecutor(ExecutorSettings(ranks=4)).slots == 4


def test_a_new_scheduler_waits_for_a_job_that_still_runs_and_never_starts_it_twice(tmp_path):
    first, job = LocalExecutor(SLEEP), Job("a", tmp_path / "a", [])
    pid = int(first.submit(job).split()[1])
    second = LocalExecutor(SLEEP)
    with pytest.raises(UserError, match="another process is training"):
        second.submit(job)
    assert second.adopt(job, None) and second.poll() == []
    os.kill(pid, 9)
    first.poll()
    assert [(one.run, one.code) for one in wait(second)] == [("a", None)]
    assert not second.adopt(job, None)


def test_what_is_left_of_an_earlier_attempt_is_ended_first(tmp_path):
    job = Job("a", tmp_path / "a", [])
    stray = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env=dict(os.environ) | {RUN_VARIABLE: str(job.folder)}
    )
    executor = LocalExecutor(SLEEP)
    executor.submit(job)
    assert stray.wait(10) == -9
    assert executor.stop() == []


def test_a_command_that_is_not_there_is_named(tmp_path):
    executor = LocalExecutor(replace(SLEEP, command=("/no/such/program", "{flags}")))
    with pytest.raises(UserError, match="cannot start a run"):
        executor.submit(Job("a", tmp_path / "a", []))


def test_one_rank_runs_the_module_and_more_go_through_torchrun(tmp_path):
    job = Job("r", tmp_path, ["--lr", "0.1"])
    one = command_of(ExecutorSettings(), job)
    assert one[1:] == ["-m", "megatron_opt.pretrain", *one[3:]] and len(SINGLE) < len(TORCHRUN)
    two = command_of(ExecutorSettings(ranks=2), job)
    assert two[1:7] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    checkpoints = str(tmp_path / "checkpoints")
    assert two[-8:] == ["--lr", "0.1", "--output-dir", str(tmp_path), "--save", checkpoints, "--load", checkpoints]


def test_only_a_fresh_word_of_interruption_counts(tmp_path):
    assert not was_interrupted(tmp_path, 0.0)
    (tmp_path / "results.json").write_text('{"status": "interrupted"}')
    assert was_interrupted(tmp_path, time.time() - 60)
    assert not was_interrupted(tmp_path, time.time() + 60)
