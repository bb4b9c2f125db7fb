"""Where runs are started: this machine, or a Slurm cluster, behind one interface."""

from __future__ import annotations

from pathlib import Path

from megatron_opt.study.executors.base import Executor, Job, Outcome
from megatron_opt.study.executors.local import LocalExecutor
from megatron_opt.study.spec import ExecutorSettings

__all__ = ["Executor", "Job", "LocalExecutor", "Outcome", "make_executor"]


def make_executor(settings: ExecutorSettings, folder: Path) -> Executor:
    """The executor a study file asks for; `folder` is the study's output."""
    if settings.kind == "slurm":
        from megatron_opt.study.executors.slurm import SlurmExecutor

        return SlurmExecutor(settings, folder)
    return LocalExecutor(settings)
