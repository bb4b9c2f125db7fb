"""Runs packed on the cores or GPUs of this machine.

Each job holds a file lock in its folder for as long as any of its processes lives. A new scheduler that finds
the lock taken waits for the job instead of starting it twice; no process id can be mistaken for another.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_opt.errors import UserError
from megatron_opt.study.executors.base import RUN_VARIABLE, Job, Outcome, command_of, evaluation_of
from megatron_opt.study.spec import ExecutorSettings


@dataclass
class _Live:
    job: Job
    process: subprocess.Popen | None
    """None for an adopted job, whose exit code nobody can learn"""
    deadline: float
    gpus: tuple[str, ...] = ()
    timed_out: bool = False


class LocalExecutor:
    """Packs `jobs` runs of `ranks` processes each on this machine."""

    def __init__(self, settings: ExecutorSettings):
        self._settings = settings
        cores = len(os.sched_getaffinity(0))
        self._gpus = visible_gpus()
        most = len(self._gpus) // settings.ranks if self._gpus else max(1, cores // settings.ranks)
        if self._gpus and not most:
            raise UserError(f"a run wants {settings.ranks} GPUs and this machine has {len(self._gpus)}; lower `ranks:`")
        self.slots = settings.jobs or most
        if self._gpus and self.slots > most:
            raise UserError(
                f"`jobs: {self.slots}` of {settings.ranks} ranks do not fit {len(self._gpus)} GPUs; lower it"
            )
        self._threads = _threads(cores // (self.slots * settings.ranks))
        self._live: dict[str, _Live] = {}

    def submit(self, job: Job) -> str:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(job.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _end_strays(job.folder)
            gpus = self._free_gpus()
            with open(job.folder / "log.txt", "ab") as log:
                process = subprocess.Popen(
                    _command(self._settings, job),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(job, gpus),
                    pass_fds=(lock,),
                    start_new_session=True,
                )
        except BlockingIOError:
            raise UserError(f"another process is training in {job.folder}; wait for it to end") from None
        except FileNotFoundError as error:
            raise UserError(f"cannot start a run: {error}; check `command:` of the executor") from None
        finally:
            os.close(lock)
        self._live[job.run] = _Live(job, process, self._deadline(), gpus)
        return f"pid {process.pid}"

    def adopt(self, job: Job, label: str | None) -> bool:
        if not _locked(job.folder):
            return False
        self._live[job.run] = _Live(job, None, self._deadline())
        return True

    def poll(self) -> list[Outcome]:
        ended = []
        for run, live in list(self._live.items()):
            if time.monotonic() > live.deadline and not live.timed_out:
                live.timed_out = True
                self._signal(live, signal.SIGKILL)
            if live.process is not None:
                code = live.process.poll()
                if code is None:
                    continue
            elif _locked(live.job.folder):
                continue
            else:
                code = None
            del self._live[run]
            ended.append(Outcome(run, code, live.timed_out))
        return ended

    def stop(self) -> list[str]:
        for number, seconds in ((signal.SIGTERM, 60.0), (signal.SIGKILL, 10.0)):
            for live in self._live.values():
                self._signal(live, number)
            end = time.monotonic() + seconds
            while any(_locked(live.job.folder) for live in self._live.values()) and time.monotonic() < end:
                time.sleep(0.05)
        for live in self._live.values():
            if live.process is not None:
                live.process.wait()
        self._live.clear()
        return []

    def _signal(self, live: _Live, number: int) -> None:
        if live.process is not None and live.process.poll() is None:
            os.killpg(live.process.pid, number)
        elif live.process is None or number == signal.SIGKILL:
            for pid in _processes(live.job.folder):
                _kill(pid, number)

    def _deadline(self) -> float:
        minutes = self._settings.timeout_minutes
        return time.monotonic() + 60 * minutes if minutes else float("inf")

    def _free_gpus(self) -> tuple[str, ...]:
        used = {gpu for live in self._live.values() for gpu in live.gpus}
        return tuple([gpu for gpu in self._gpus if gpu not in used][: self._settings.ranks])

    def _environment(self, job: Job, gpus: tuple[str, ...]) -> dict[str, str]:
        environment = dict(os.environ) | {
            "OMP_NUM_THREADS": str(self._threads),
            RUN_VARIABLE: str(job.folder),
        }
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        return environment | self._settings.environment


def _threads(share: int) -> int:
    """Threads of a rank: its share of the cores, or OMP_NUM_THREADS where that is less, as beside another study."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(share, int(given)) if given.isdigit() else share)


def _command(settings: ExecutorSettings, job: Job) -> list[str]:
    """The training, then the evaluation; the latter alone where only it is left."""
    train, evaluate = command_of(settings, job), evaluation_of(settings, job)
    if not evaluate or job.trained:
        return evaluate or train
    # the shell outlives a signal to its group, which the trainer answers by saving
    steps = (
        f"trap stopped=1 TERM; {shlex.join(train)} || exit; [ -z $stopped ] || exit 143; exec {shlex.join(evaluate)}"
    )
    return ["/bin/sh", "-c", steps]


def visible_gpus() -> list[str]:
    """The GPUs jobs may use: CUDA_VISIBLE_DEVICES, else what nvidia-smi lists, else none."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip() and gpu.strip() != "-1"]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    return listed.stdout.split() if listed.returncode == 0 else []


def _locked(folder: Path) -> bool:
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def _processes(folder: Path) -> list[int]:
    """Processes that carry the run's mark in their environment, such as ranks whose launcher was killed."""
    mark = f"{RUN_VARIABLE}={folder}".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
            except OSError:
                continue
    return pids


def _end_strays(folder: Path) -> None:
    """Kill what is left of an earlier attempt: two trainers must never write one folder."""
    end = time.monotonic() + 10
    while (strays := _processes(folder)) and time.monotonic() < end:
        for pid in strays:
            _kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
