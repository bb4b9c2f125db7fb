"""Verdicts on hangs and losses, apart from the runs of tests/cluster that provoke them."""

import json
import math
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_opt.checkpointing import folders
from megatron_opt.training import faults
from megatron_opt.training.stragglers import OwnTime
from tests.checkpointing.test_folders import write


def test_spikes_need_history_and_do_not_join_it():
    watch = faults.LossWatch(2.0)
    assert not any(watch.spike(10.0 - i) for i in range(8))
    assert watch.spike(14.0) and watch.spike(14.0) and watch.spike(math.nan) and watch.spike(math.inf)
    assert not watch.spike(5.0)
    assert watch.spikes == 4 and max(watch.recent) == 10.0


def test_the_first_losses_are_never_spikes_unless_not_finite():
    watch = faults.LossWatch(1.5)
    assert [watch.spike(x) for x in (1.0, 50.0, math.nan, 3.0)] == [False, False, True, False]


def test_global_loss_weighs_tokens(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **kwargs: zeros(*size, **kwargs))
    reduced = [{"lm loss": torch.tensor([30.0, 10.0])}, {"lm loss": torch.tensor([2.0, 6.0])}]
    assert faults._global_loss(reduced) == 2.0
    assert math.isnan(faults._global_loss([]))


def test_rollback_goes_back_far_enough_and_notes_the_data(tmp_path):
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
        folders.publish(tmp_path, iteration)
    assert faults.rollback(tmp_path, 33, 5) == 20
    assert folders.iterations(tmp_path) == [20, 10]
    assert (tmp_path / folders.TRACKER).read_text() == "20"
    assert faults.skipped_iterations(tmp_path) == list(range(21, 34))
    assert faults.rollback(tmp_path, 35, 0) == 20
    assert faults.skipped_iterations(tmp_path) == list(range(21, 36))
    assert faults.rollback(tmp_path, 35, 30) is None
    assert json.loads((tmp_path / faults.SKIP_FILE).read_text())[-1] == 35


def waits(iteration, collective="all_reduce"):
    return {"iteration": iteration, "collective": collective, "at": "optimizer.py:10 step"}


BUSY = {"iteration": 7, "collective": None, "at": "batches.py:5 get_batch"}


@pytest.mark.parametrize(
    "reports, world, guilty",
    [
        ({0: waits(7), 1: BUSY, 2: waits(7)}, 3, [1]),
        ({0: waits(7), 2: waits(7)}, 3, [1]),  # 1 does not answer
        ({0: waits(7), 1: waits(6), 2: waits(7)}, 3, [1]),  # 1 is a step behind
        ({0: BUSY, 1: waits(7)}, 2, [0]),
    ],
)
def test_the_guilty_rank_and_the_collective_are_named(reports, world, guilty):
    verdict = faults.judge(reports, world)
    assert verdict["guilty"] == guilty and verdict["collective"] == "all_reduce"
    text = faults.describe(verdict)
    assert f"rank {guilty[0]}" in text and "all_reduce (optimizer.py:10 step)" in text


def stack_of(function):
    """Where a thread that runs `function(release)` stands."""
    ready, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: function(ready, release))
    thread.start()
    ready.wait(30)
    time.sleep(0.2)
    where = faults.position(sys._current_frames()[thread.ident])
    release.set()
    thread.join()
    return where


def test_position_tells_a_collective_from_work():
    def work(ready, release):
        ready.set()
        while not release.is_set():
            pass

    where = stack_of(work)
    assert where["collective"] is None and where["at"]

    def pause(ready, release):
        ready.set()
        release.acquire = release.wait  # blocks in a line without a wait call
        release.acquire(30)

    namespace = {"__name__": "torch.distributed.distributed_c10d", "pause": pause}
    exec("def all_gather(a, b):\n    return _inner(a, b)\ndef _inner(a, b):\n    pause(a, b)", namespace)
    where = stack_of(namespace["all_gather"])
    assert where["collective"] == "all_gather"


def test_an_asynchronous_collective_is_waited_for():
    def finish(ready, handle):
        ready.set()
        handle.wait(30)

    frame = {}

    class Handle:
        def wait(self, seconds):
            frame["caller"] = sys._getframe(1)

    finish(threading.Event(), Handle())
    assert faults.position(frame["caller"])["collective"] == "wait"


def test_the_clock_around_a_wait_hides_nothing():
    lock = threading.Lock()
    lock.acquire()

    class Handle:
        wait = staticmethod(OwnTime().timed(lock.acquire))

    def finish(ready, release):
        ready.set()
        Handle.wait()

    ready, release = threading.Event(), threading.Event()
    thread = threading.Thread(target=finish, args=(ready, release))
    thread.start()
    ready.wait(30)
    time.sleep(0.2)
    where = faults.position(sys._current_frames()[thread.ident])
    lock.release()
    thread.join()
    assert where["collective"] == "wait" and "finish" in where["at"] and "stragglers" not in where["at"]


def test_the_watch_sees_a_start_that_never_ends(tmp_path):
    """A process that loops before it has met the others, and before any step, is reported and left."""
    code = """
import time
from megatron_opt.training import faults
faults.HangWatch(0.2, 0.6).start()
began = time.monotonic()
while time.monotonic() - began < 60:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == faults.HANG_EXIT
    assert "no step for 1 s. Held up by rank 0" in done.stderr


def test_the_first_step_may_take_longer():
    watch = faults.HangWatch(5.0, 50.0)
    watch.moved -= 10
    assert not watch._still()
    watch.beat(1)
    watch.moved -= 10
    assert watch._still() > 5
