"""Runs as Slurm jobs: one batch script each, which starts torchrun on every node through srun, to train and then to evaluate.

Jobs live on without the scheduler. A job is known by its name (the run) and its working directory (the run's
folder), so a new scheduler finds it in the queue even if the last one died before noting its number.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from pathlib import Path

from megatron_opt.errors import UserError
from megatron_opt.files import write_output
from megatron_opt.study.executors.base import RUN_VARIABLE, Job, Outcome, command_of, evaluation_of
from megatron_opt.study.executors.base import TORCHRUN as ONE_NODE
from megatron_opt.study.spec import ExecutorSettings

RENDEZVOUS = "RENDEZVOUS"
"""placeholder in the command, replaced in the script by the first node and a port of the job's own"""

TORCHRUN = (
    "{python}",
    "-m",
    "torch.distributed.run",
    "--nnodes",
    "{nodes}",
    "--nproc-per-node",
    "{ranks}",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    RENDEZVOUS,
)
POLL_SECONDS, PATIENCE_SECONDS = 5.0, 600.0
SAVE_SECONDS = 120
"""warning before the time limit, so that the job can save a checkpoint"""

_SCRIPT = """\
#!/bin/bash
{options}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
stopped=
trap 'stopped=1; kill -TERM "$step"' TERM
# A step in the background, so that a signal is heard while it works; a launcher that was told to stop reports the code of a failure.
step() {{
    [ -z "$stopped" ] || {{ code=143; return; }}
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 "$@" &
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        code=$?
    done
    [ -z "$stopped" ] || code=143
}}
{steps}
echo "$code" > exit_code.tmp && mv exit_code.tmp exit_code
exit "$code"
"""


class SlurmExecutor:
    """Submits jobs with sbatch and watches them with squeue."""

    def __init__(self, settings: ExecutorSettings, folder: Path):
        self._settings, self._folder = settings, folder
        for program in ("sbatch", "squeue", "scancel"):
            if shutil.which(program) is None:
                raise UserError(f"`kind: slurm` needs {program} on this machine; run on a login node, or use local")
        self.slots = settings.jobs or 64
        self._live: dict[str, Job] = {}
        self._next = self._answered = time.monotonic()

    def submit(self, job: Job) -> str:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "exit_code").unlink(missing_ok=True)
        script = job.folder / "job.sh"
        write_output(script, self._script(job))
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"sbatch refused {script}: {done.stderr.strip()}; check `slurm:` in the study file")
        self._live[job.run] = job
        return f"slurm {done.stdout.strip().split(';')[0]}"

    def adopt(self, job: Job, label: str | None) -> bool:
        end = time.monotonic() + PATIENCE_SECONDS
        while (queue := self._queue()) is None:
            if time.monotonic() > end:
                raise UserError("squeue does not answer; try again when the cluster is back")
            time.sleep(POLL_SECONDS)
        if (job.run, str(job.folder)) in queue:
            self._live[job.run] = job
            return True
        return False

    def poll(self) -> list[Outcome]:
        if not self._live or time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + POLL_SECONDS
        queue = self._queue()
        if queue is None:
            if time.monotonic() - self._answered > PATIENCE_SECONDS:
                raise UserError("squeue has not answered for ten minutes; jobs go on, run the same command later")
            return []
        self._answered = time.monotonic()
        ended = []
        for run, job in list(self._live.items()):
            if (run, str(job.folder)) not in queue:
                del self._live[run]
                ended.append(Outcome(run, _exit_code(job.folder)))
        return ended

    def stop(self) -> list[str]:
        """Jobs stay in Slurm's queue; the next scheduler adopts them."""
        left = list(self._live)
        self._live.clear()
        return left

    def _script(self, job: Job) -> str:
        settings = self._settings
        options = {
            "job-name": job.run,
            "chdir": job.folder,
            "output": job.folder / "log.txt",
            "open-mode": "append",
            "nodes": settings.nodes,
            "ntasks-per-node": 1,
            "signal": f"B:TERM@{SAVE_SECONDS}",
            "no-requeue": True,
        }
        if settings.timeout_minutes:
            options["time"] = f"0:{max(1, round(60 * settings.timeout_minutes))}"
        options |= {str(key).replace("_", "-"): value for key, value in settings.slurm.items()}
        lines = [f"#SBATCH --{key}" + ("" if value is True else f'="{value}"') for key, value in options.items()]
        variables = settings.environment | {RUN_VARIABLE: str(job.folder)}
        lines += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
        # one node needs no name that resolves and no agreed port
        launcher = ONE_NODE if settings.nodes == 1 else TORCHRUN
        commands = [] if job.trained else [command_of(settings, job, launcher)]
        commands += [words for words in [evaluation_of(settings, job, launcher)] if words]
        steps = '\n[ "$code" != 0 ] || '.join(f"step {_quoted(words)}" for words in commands)
        return _SCRIPT.format(options="\n".join(lines), steps=steps)

    def _queue(self) -> set[tuple[str, str]] | None:
        """(name, working directory) of this user's jobs that wait or run; None when squeue fails."""
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--states=PD,CF,R,CG,S,ST", "--format=%j|%Z"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return None
        rows = (line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
        return {(name, folder) for name, folder in rows}


def _quoted(words: list[str]) -> str:
    return " ".join('"$head:$port"' if word == RENDEZVOUS else shlex.quote(word) for word in words)


def _exit_code(folder: Path) -> int | None:
    """What the job's script wrote; None when it was cancelled, preempted or its node failed."""
    try:
        return int((folder / "exit_code").read_text())
    except (OSError, ValueError):
        return None
