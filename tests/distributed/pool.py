"""Starts ranks once, lets them make many runs, and hands back what each run recorded."""

import contextlib
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opt.data.indexed import bin_path, idx_path, write_index
from tests.distributed import recording, transport
from tests.distributed.cases import Case

ROOT = Path(__file__).parents[2]
PATIENCE = 400.0  # seconds without any rank's result; a rank is killed by its worker long before


def write_dataset(prefix: Path, documents: int = 800) -> str:
    """Made-up documents of token ids 0 … 126 in Megatron's format: each id has a few likely successors.

    Small batches hold more different tokens than the model is wide, so that no gradient is rank-deficient by its data:
    in a null space SOAP would scale rounding noise up to whole updates, and no two layouts could agree.
    """
    draw = random.Random(1)
    successors = [[draw.randrange(127) for _ in range(4)] for _ in range(127)]
    lengths, tokens = [], []
    for _ in range(documents):
        lengths.append(draw.randint(20, 100))
        token = draw.randrange(127)
        for _ in range(lengths[-1]):
            tokens.append(token)
            token = draw.choice(successors[token]) if draw.random() < 0.7 else draw.randrange(127)
    bin_path(prefix).write_bytes(np.array(tokens, dtype=np.uint16).tobytes())
    with open(idx_path(prefix), "wb") as stream:
        write_index(stream, np.uint16, np.array(lengths, dtype=np.int32))
    return str(prefix)


@dataclass
class Run:
    """What the ranks of one case recorded."""

    case: Case
    ranks: list[dict[str, Any]]

    @property
    def error(self) -> str | None:
        """The first rank's error, if any rank had one."""
        return next((r["error"] for r in self.ranks if "error" in r), None)

    @property
    def user_errors(self) -> list[str | None]:
        return [r.get("user_error") for r in self.ranks]

    @property
    def losses(self) -> list[float]:
        assert self.error is None and not any(self.user_errors), (self.case.name, self.error, self.user_errors)
        return max((r["losses"] for r in self.ranks), key=len)

    @property
    def grad_norms(self) -> list[float]:
        return self.ranks[0]["grad_norms"]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return recording.whole([block for rank in self.ranks for block in rank["weights"]])

    @property
    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Whole state tensors by kind and matrix."""
        keys = sorted({key for rank in self.ranks for key in rank["state"]})
        return {
            key: recording.whole([block for rank in self.ranks for block in rank["state"].get(key, [])]) for key in keys
        }


class Pool:
    """Processes that import Megatron once and then make batch after batch of cases."""

    def __init__(
        self, folder: Path, members: int, packages: Path | None = None, transformer_engine: bool = False
    ) -> None:
        self.folder, self.members, self.batches, self.starts = folder, members, 0, 0
        here = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        self.path = os.pathsep.join(
            map(str, [ROOT, *([packages] if packages else []), *here])
        )  # what ranks import from
        self.transformer_engine = transformer_engine
        folder.mkdir(parents=True, exist_ok=True)
        self.data = write_dataset(folder / "text")
        self.process: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        self.home = self.folder / f"start{self.starts}"
        self.home.mkdir()
        self.starts, self.batches = self.starts + 1, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": self.path}
        command = [sys.executable, "-m", "tests.distributed.worker", str(self.home), str(self.members), self.data]
        command += ["transformer_engine"] if self.transformer_engine else []
        with open(self.home / "launcher.log", "w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def close(self) -> None:
        """End all processes of this pool."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def run(self, cases: Sequence[Case]) -> dict[str, Run]:
        """Make all cases; those that need fewer ranks than there are members run side by side."""
        assert len({case.name for case in cases}) == len(cases), "cases need names of their own"
        with open(Path(tempfile.gettempdir()) / "megatron_opt-ranks.lock", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # ranks of two test sessions on one machine would starve each other
            return self._run(cases)

    def _run(self, cases: Sequence[Case]) -> dict[str, Run]:
        if self.process is None or self.process.poll() is not None:
            self._start()
        here = self.home / str(self.batches)
        here.mkdir()
        part = self.home / "plan.part"
        part.write_text(json.dumps(_schedule(cases, self.members)))
        os.replace(part, self.home / f"plan.{self.batches}.json")
        self.batches += 1
        waiting = [here / f"{case.name}.{rank}.pt" for case in cases for rank in range(case.ranks)]
        came = time.monotonic()
        while waiting and time.monotonic() < came + PATIENCE and self.process and self.process.poll() is None:
            still = [path for path in waiting if not path.exists()]
            came = time.monotonic() if len(still) < len(waiting) else came
            waiting = still
            time.sleep(0.05)
        if waiting:
            self.close()
        transport.leave(here)
        return {case.name: self._collect(case, here) for case in cases}

    def _collect(self, case: Case, here: Path) -> Run:
        ranks = []
        for rank in range(case.ranks):
            path = here / f"{case.name}.{rank}.pt"
            if path.exists():
                ranks.append(torch.load(path, weights_only=False))
            else:
                tails = [log.read_text(errors="replace")[-1500:] for log in sorted(self.home.glob("*.log"))]
                ranks.append({"error": f"{path.name} is missing; the logs end:\n" + "\n".join(tails)})
        return Run(case, ranks)


def _schedule(cases: Sequence[Case], members: int) -> list[dict[str, Any]]:
    """Members for every case, the least busy ones; the order of cases is the same for all, so none waits for ever."""
    busy = [0.0] * members
    entries = []
    for case in cases:
        start = min(range(members - case.ranks + 1), key=lambda s: (max(busy[s : s + case.ranks]), s))
        chosen = range(start, start + case.ranks)
        until = max(busy[m] for m in chosen) + case.steps
        for member in chosen:
            busy[member] = until
        entries.append({**asdict(case), "members": list(chosen)})
    return entries
