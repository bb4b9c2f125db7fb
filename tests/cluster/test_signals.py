"""SIGTERM and SIGUSR1: saved at the end of the step, left with the scheduler's code, resumed without a trace."""

import signal

import pytest

from tests.cluster.conftest import ITERATIONS, LIMIT
from tests.cluster.harness import compare, losses


@pytest.mark.parametrize("name, code, more", [("SIGTERM", 143, ()), ("SIGUSR1", 138, ("--async-save",))])
def test_a_signal_saves_and_the_same_command_goes_on(job, reference, name, code, more):
    run = job(*more, interval=1000)
    run.start()
    run.until(lambda: run.iteration() >= 3, LIMIT, "three steps")
    run.process.send_signal(getattr(signal, name))
    assert run.wait(LIMIT) == code, run.tail()
    (saved,) = run.events("save")
    assert ("stall_seconds" in saved) == bool(more)  # Megatron may turn background saving off, and only warn
    (received,) = run.events("signal")
    assert received["signal"] == name and 3 <= saved["iteration"] < ITERATIONS
    assert run.finish(LIMIT) == 0, run.tail()
    assert run.events("resume")[-1]["iteration"] == saved["iteration"]
    assert run.events("resume")[-1]["consumed_samples"] == 8 * saved["iteration"]
    assert compare(reference, losses(run.folder)) == []
