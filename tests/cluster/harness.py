"""Small real runs to be disturbed: started by the launcher, watched by their files, ended with their losses."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_opt.checkpointing import folders
from megatron_opt.training import events
from tests.distributed.pool import write_dataset

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "16", "--lr", "3e-3",
    "--micro-batch-size", "1", "--global-batch-size", "8", "--lr-warmup-iters", "5",
    "--tokenizer-type", "NullTokenizer",
    "--vocab-size", "127", "--eval-iters", "1", "--eval-interval", "100000", "--attention-dropout", "0",
    "--hidden-dropout", "0", "--log-interval", "1", "--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear",
    "--position-embedding-type", "rope", "--untie-embeddings-and-output-weights",
]  # fmt: skip
LAYOUTS = {
    "DP2": ("--use-distributed-optimizer",),
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
}


def environment(**more: str) -> dict[str, str]:
    """This tree's package, one thread a rank, no launcher's leftovers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "PET_"))}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return kept | more


def job_flags(folder: Path, iterations: int, save: Path | None = None, interval: int = 5) -> list[str]:
    """Training flags of a run below `folder`, whose dataset lies beside it."""
    prefix = folder.parent / "text"
    if not Path(f"{prefix}.idx").is_file():
        write_dataset(prefix)
    save = save or folder / "checkpoints"
    return [
        *FLAGS, "--train-data-path", str(prefix), "--valid-data-path", str(prefix), "--test-data-path", str(prefix),
        "--data-cache-path", str(folder.parent / "cache"), "--train-iters", str(iterations),
        "--save", str(save), "--load", str(save), "--save-interval", str(interval), "--output-dir", str(folder),
    ]  # fmt: skip


@dataclass
class Run:
    """One command, started as often as it takes."""

    folder: Path
    flags: list[str]
    launcher: tuple[str, ...] = ("--nproc-per-node", "2", "--max-restarts", "100")
    env: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()  # such as ("ip", "netns", "exec", NAME)
    process: subprocess.Popen | None = None
    starts: int = 0

    def start(self) -> subprocess.Popen:
        """Start the launcher in a session of its own; output goes to FOLDER/log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [*self.prefix, sys.executable, "-m", "megatron_opt.cli", "train", *self.launcher, *self.flags]
        with (self.folder / "log").open("ab") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            env = environment(**self.env)
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams)  # type: ignore
        self.starts += 1
        return self.process

    def finish(self, seconds: float) -> int:
        """Start and wait for the end."""
        self.start()
        return self.wait(seconds)

    def ranks(self) -> list[int]:
        """Processes of the training ranks, lowest id first."""
        if self.process is None or self.process.poll() is not None:
            return []
        try:
            agent = psutil.Process(self.process.pid)
            found = [child for child in agent.children() if "megatron_opt.pretrain" in " ".join(child.cmdline())]
        except psutil.Error:
            return []
        return sorted(child.pid for child in found)

    def wait(self, seconds: float) -> int:
        """Exit code; a run that does not end is killed and is an error."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the run did not end within {seconds:.0f} s:\n{self.tail()}") from None

    def end(self) -> None:
        """Kill launcher and ranks, whatever state they are in."""
        if self.process is not None and self.process.poll() is None:
            members = psutil.Process(self.process.pid).children(recursive=True)
            for member in [psutil.Process(self.process.pid), *members]:
                try:
                    member.kill()
                except psutil.Error:
                    continue
            self.process.wait(timeout=30)

    def tail(self, lines: int = 40) -> str:
        """End of the log."""
        path = self.folder / "log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.is_file() else "no log"

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Events of the run so far, of these names or all."""
        return [entry for entry in events.read(self.folder) if not names or entry["event"] in names]

    def iteration(self) -> int:
        """Newest logged iteration."""
        return max((n for kind, n in losses(self.folder) if kind == "train"), default=0)

    def until(self, condition: Any, seconds: float, what: str) -> None:
        """Wait for `condition()`; the run must not end meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process is not None and self.process.poll() is not None
            if ended and not condition():
                raise AssertionError(f"the run ended with {self.process.returncode} before {what}:\n{self.tail()}")  # type: ignore[union-attr]
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"{what}: not within {seconds:.0f} s:\n{self.tail()}")
            time.sleep(0.05)


def losses(folder: Path) -> dict[tuple[str, int], tuple[float, float | None]]:
    """(loss, gradient norm) by (kind, iteration), where a later line supersedes an earlier one."""
    found: dict[tuple[str, int], tuple[float, float | None]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        found[row["kind"], row["iteration"]] = (row["loss"], row.get("grad_norm"))
    return found


def resumes(folder: Path) -> list[tuple[float, int]]:
    """(time, iteration) from which the run was gone on with: what came after that iteration before is void."""
    found, saved = [], False
    for entry in events.read(folder):
        saved |= entry["event"] == "save"
        if entry["event"] == "resume":
            found.append((entry["time"], entry["iteration"]))
        elif entry["event"] in ("start", "restart") and not saved:  # there is nothing to resume from
            found.append((entry["time"], 0))
    return found


@dataclass
class Outcome:
    """A disturbed run against its undisturbed twin."""

    kills: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    restarts: int = 0
    different: list[tuple[str, int]] = field(default_factory=list)
    orphans: int = 0
    damaged: int = 0
    seconds: float = 0.0


def undisturbed(folder: Path, flags: list[str], seconds: float) -> dict[tuple[str, int], tuple[float, float | None]]:
    """Losses of the run to compare with."""
    run = Run(folder, flags)
    assert run.finish(seconds) == 0, run.tail()
    return losses(folder)


def saving(save: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((save / folders.STAGING).glob("iter_*/*")) if save.is_dir() else False


def _strike(run: Run, target: str, draw: random.Random, save: Path, limit: float) -> bool:
    """Kill once at a random moment; False when the run ended before it came to that."""
    assert run.process is not None
    run.until(lambda: run.ranks() or run.process.poll() is not None, limit, "ranks")  # type: ignore[union-attr]
    if target == "start-up":
        time.sleep(draw.uniform(0.0, 4.0))
    else:
        reached = run.iteration()
        try:
            run.until(lambda: run.iteration() > reached and run.ranks(), limit, "a step")
        except AssertionError:
            if run.process.poll() == 0:
                return False
            raise
        if target == "save":
            deadline = time.monotonic() + limit
            while not saving(save) and run.process.poll() is None:
                assert time.monotonic() < deadline, f"no save within {limit:.0f} s:\n{run.tail()}"
                time.sleep(0.002)
        else:
            time.sleep(draw.uniform(0.0, 1.5))
    if run.process.poll() is not None:
        return False
    victim = run.process.pid if target == "agent" else draw.choice(run.ranks() or [run.process.pid])
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def disturbed(
    folder: Path, flags: list[str], targets: list[str], draw: random.Random, save: Path, limit: float
) -> tuple[Outcome, dict[tuple[str, int], tuple[float, float | None]]]:
    """Run to the end through one kill for each of `targets` (rank, agent, save, start-up)."""
    run, outcome, began = Run(folder, flags), Outcome(), time.monotonic()
    run.start()
    pending = list(targets)
    while True:
        assert run.process is not None
        if pending and run.process.poll() is None and _strike(run, pending[0], draw, save, limit):
            target = pending.pop(0)
            outcome.kills[target] = outcome.kills.get(target, 0) + 1
            time.sleep(0.5)
            if run.process.poll() is not None:  # it was the agent: its ranks must be gone with it
                outcome.orphans += len(_strays(folder))
                run.start()
            continue
        code = run.wait(limit)
        if code == 0:
            break
        assert code in (-signal.SIGKILL, 1), run.tail()
        run.start()
    outcome.starts, outcome.restarts = run.starts, len(run.events("restart"))
    outcome.damaged, outcome.seconds = len(run.events("damaged")), time.monotonic() - began
    return outcome, losses(folder)


def _strays(folder: Path, patience: float = 5.0) -> list[int]:
    """Ranks of this run that outlive their agent."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(folder) in words and "megatron_opt.pretrain" in words and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def compare(reference: dict, got: dict) -> list[tuple[str, int]]:
    """Keys at which two runs differ in a bit, or which one of them lacks."""
    return sorted(key for key in reference.keys() | got.keys() if reference.get(key) != got.get(key))
