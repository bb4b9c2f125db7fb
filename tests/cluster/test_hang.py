"""A rank that stands still: named, with the collective the others wait in; then restarted, with the same losses."""

import os
import signal
import time

from tests.cluster.conftest import LIMIT
from tests.cluster.harness import compare, losses


def test_a_stopped_rank_is_named_and_the_run_goes_on(job, reference):
    run = job("--hang-timeout", "8")
    run.start()
    run.until(lambda: run.iteration() >= 7, LIMIT, "seven steps")
    began, victim = time.monotonic(), run.ranks()[1]  # local rank 1: ranks are started in order
    os.kill(victim, signal.SIGSTOP)
    run.until(lambda: run.events("hang"), LIMIT, "a report")
    (hang,) = run.events("hang")
    assert hang["guilty"] == [1] and hang["silent"] == [1]
    assert hang["collective"] and hang["at"]
    assert time.monotonic() - began < 60
    assert run.wait(LIMIT) == 0, run.tail()
    assert len(run.events("restart")) == 1
    assert compare(reference, losses(run.folder)) == []
