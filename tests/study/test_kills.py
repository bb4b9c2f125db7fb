"""Kills at random moments: the scheduler, and the trainers, lose nothing and repeat nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_opt.study.executors.base import RUN_VARIABLE
from megatron_opt.study.store import Store
from tests.study.conftest import STUDY

KILLS, STEPS = 20, 40


def trainers(output):
    """Process ids of running trainers of a study."""
    mark = f"{RUN_VARIABLE}={output}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if any(item.startswith(mark) for item in (entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def start(path, output, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_opt.cli", "study", "run", str(path), "--output", str(output)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )


def kill(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_kills_lose_and_repeat_nothing(make_study, tmp_path):
    rng, output = random.Random(0), tmp_path / "out"
    wider = STUDY.replace("0.008, 0.064]", "0.008, 0.016, 0.024, 0.064]").replace("0.032]", "0.032, 0.004, 0.064]")
    path = make_study(wider.replace("executor:", "phases: [descent]\nexecutor:\n  retries: 0"))
    environment = dict(os.environ) | {"FAKE_STEPS": str(STEPS), "FAKE_SLEEP": "0.06", "OMP_NUM_THREADS": "1"}
    scheduler = start(path, output, environment)
    done = {"scheduler": 0, "trainer": 0}
    for i in range(KILLS):
        if i % 2:
            end = time.monotonic() + 10
            while not (alive := trainers(output)) and time.monotonic() < end and scheduler.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.4))
            for victim in rng.sample(alive, min(1, len(alive))):
                done["trainer"] += kill(victim, rng.choice([signal.SIGKILL, signal.SIGTERM]))
            continue
        time.sleep(rng.uniform(0.2, 2.0))
        done["scheduler"] += scheduler.poll() is None
        scheduler.kill()
        scheduler.communicate()
        time.sleep(rng.uniform(0.0, 0.5))
        scheduler = start(path, output, environment)
    _, errors = scheduler.communicate(timeout=200)
    assert scheduler.returncode == 0, errors
    assert done["scheduler"] >= 5 and done["trainer"] >= 5
    with Store(output / "study.sqlite") as store:
        runs, events = store.runs(), store.events()
        assert {run.status for run in runs} <= {"completed", "diverged"}
        results = Counter(run for _, run, what in events if what in ("completed", "diverged"))
        for run in runs:
            assert results[run.id] == 1
            ledger = Counter(int(line) for line in (output / "runs" / run.id / "ledger").read_text().split())
            flags = run.config["flags"]
            assert set(ledger) == {step * flags["train-iters"] // STEPS for step in range(1, STEPS + 1)}
            # A kill between training a step and saving it repeats that one step, and no more.
            assert sum(ledger.values()) - len(ledger) <= run.attempts - 1
            curve = store.curve(run.id)
            assert len(curve.train) == STEPS
    assert trainers(output) == []


def test_a_stopped_study_saves_its_runs_and_goes_on(make_study, tmp_path):
    output = tmp_path / "out"
    path = make_study()
    environment = dict(os.environ) | {"FAKE_STEPS": "20", "FAKE_SLEEP": "0.1", "OMP_NUM_THREADS": "1"}
    scheduler = start(path, output, environment)
    end = time.monotonic() + 30
    while not trainers(output) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    scheduler.send_signal(signal.SIGTERM)
    scheduler.communicate(timeout=30)
    assert scheduler.returncode == 130 and trainers(output) == []
    with Store(output / "study.sqlite") as store:
        assert all(run.status != "running" for run in store.runs())
        interrupted = [run for run in store.runs() if run.interruptions]
        assert interrupted
    scheduler = start(path, output, environment | {"FAKE_SLEEP": "0"})
    scheduler.communicate(timeout=60)
    assert scheduler.returncode == 0
    ledger = (output / "runs" / interrupted[0].id / "ledger").read_text().split()
    assert len(set(ledger)) == 20 and len(ledger) <= 21
