"""The interface of an executor, and what all of them share."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_opt.study.spec import ExecutorSettings

RUN_VARIABLE = "MEGATRON_OPT_STUDY_RUN"
"""environment variable that marks every process of a run with the run's folder"""

TORCHRUN = ("{python}", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{ranks}")
SINGLE = ("{python}",)
TRAIN = ("-m", "megatron_opt.pretrain", "{flags}")
EVALUATE = ("-m", "megatron_opt.cli", "eval")
"""what a launcher starts on every rank"""


@dataclass(frozen=True)
class Job:
    """A run to start: its folder holds metrics.jsonl, results.json, log.txt and checkpoints."""

    run: str
    folder: Path
    arguments: list[str]
    evaluation: tuple[str, ...] = ()
    """arguments of `megatron-opt eval` for its last checkpoint; none: it is not evaluated"""
    trained: bool = False
    """only the evaluation is left to do"""


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `code` is None when it ended while nobody watched."""

    run: str
    code: int | None
    timed_out: bool = False


class Executor(Protocol):
    """Starts jobs and says which have ended; knows nothing of the study."""

    slots: int
    """jobs that may be submitted at once"""

    def submit(self, job: Job) -> str:
        """Start a job; returns a label such as `pid 123`, kept for the record."""
        ...

    def adopt(self, job: Job, label: str | None) -> bool:
        """Take over a job of a scheduler that is gone; False when the job is not alive any more."""
        ...

    def poll(self) -> list[Outcome]:
        """Jobs that ended since the last call; returns at once."""
        ...

    def stop(self) -> list[str]:
        """End jobs with a signal that lets them save a checkpoint; returns the runs that go on by
        themselves.
        """
        ...


def command_of(settings: ExecutorSettings, job: Job, launcher: tuple[str, ...] | None = None) -> list[str]:
    """The command line of a job's training, from its template.

    Words may hold {python} {ranks} {nodes} {output} {run}; the word {flags} becomes all flags.
    """
    checkpoints = str(job.folder / "checkpoints")
    flags = [*job.arguments, "--output-dir", str(job.folder), "--save", checkpoints, "--load", checkpoints]
    template = settings.command or (*_launcher(settings, launcher), *TRAIN)
    return _filled(template, settings, job, flags)


def evaluation_of(settings: ExecutorSettings, job: Job, launcher: tuple[str, ...] | None = None) -> list[str]:
    """The command line of a job's evaluation, on as many ranks as its training; empty where there is none."""
    if not job.evaluation:
        return []
    return [*_filled((*_launcher(settings, launcher), *EVALUATE), settings, job, []), *job.evaluation]


def _launcher(settings: ExecutorSettings, launcher: tuple[str, ...] | None) -> tuple[str, ...]:
    return launcher or (SINGLE if settings.ranks == 1 else TORCHRUN)


def _filled(template: tuple[str, ...], settings: ExecutorSettings, job: Job, flags: list[str]) -> list[str]:
    names = {
        "python": sys.executable,
        "ranks": settings.ranks,
        "nodes": settings.nodes,
        "output": job.folder,
        "run": job.run,
    }
    words: list[str] = []
    for word in template:
        words += flags if word == "{flags}" else [word.format(**names)]
    return words


def read_results(folder: Path) -> dict[str, Any] | None:
    """results.json of a finished run; None when absent, interrupted or unreadable."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(results, dict) or results.get("status") not in ("completed", "diverged"):
        return None
    return results


def was_interrupted(folder: Path, since: float) -> bool:
    """The run itself says, after `since` (Unix time), that it saved a checkpoint and stopped before
    its end.
    """
    path = folder / "results.json"
    try:
        return path.stat().st_mtime >= since and json.loads(path.read_text())["status"] == "interrupted"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def saved_since(folder: Path, since: float) -> bool:
    """A checkpoint was written after `since` (Unix time), so that another attempt starts further on."""
    try:
        return any(entry.stat().st_mtime >= since for entry in (folder / "checkpoints").iterdir())
    except OSError:
        return False


def last_words(folder: Path, limit: int = 300) -> str:
    """The end of a run's log: the line that most likely says why it failed."""
    try:
        text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "no log"
    return last_line(text, limit) or "an empty log"


def last_line(text: str, limit: int = 300) -> str:
    """The end of the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-limit:] if lines else ""
