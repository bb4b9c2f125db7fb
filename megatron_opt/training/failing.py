"""What one rank refuses or fails at ends every rank of its job: at once, with one exit code, said once.

A rank that ends badly leaves its exit code in the job's store (MASTER_ADDR:MASTER_PORT). A thread of each other rank waits
for that and ends its process, whatever meeting, collective or disk its main thread waits for. Without it torchrun ends
the ranks of one node, srun none, and ranks of NCCL wait for the time limit of a collective.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_opt.training import events

_PATIENCE = 15.0  # seconds in which rank 0 must be there, the store answer, and others have heard
_FOR_THE_DEAD = 2.0  # the last of them where another rank is gone without a word
_LAST = 0.2  # by which the process with the store outlives the others
_line: "_Line | None" = None


def listen() -> None:
    """From now on this rank ends when another one has ended badly; nothing where there is one process."""
    global _line
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and _line is None:
        _line = _Line(rank, ranks)


def tell(code: int, reason: str | None) -> tuple[int, bool]:
    """End the other ranks: (the exit code of the job, whether the reason is still to be printed).

    The first rank to tell decides the code. `reason` None: this rank falls because another one is gone.
    """
    return (code, True) if _line is None else _line.tell(code, reason)


class _Line:
    """This rank's connection to the job's store."""

    def __init__(self, rank: int, ranks: int) -> None:
        import torch.distributed  # noqa: F401  (here, and not first in the thread)

        self.rank, self.ranks = rank, ranks
        # torch's own meeting counts restarts in its keys likewise
        self.key = f"megatron_opt/failure/{events.restarts()}"
        self.heard, self.done = f"{self.key}/heard", f"{self.key}/done"
        self.host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store: Any = None
        self.connected, self.ending = threading.Event(), threading.Event()
        if self.host:
            self._connect()
        threading.Thread(target=self._listen, name="failures", daemon=True).start()

    def _connect(self) -> None:
        """The store of torch's own meeting; rank 0 opens it before, and the meeting then finds it open."""
        from torch.distributed import TCPStore

        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(minutes=30)
        store = TCPStore(*where, None, self.host, patience, wait_for_workers=False, multi_tenant=True)
        store.set_timeout(timedelta(seconds=_PATIENCE))  # a host whose link is cut does not answer
        self.store = store
        self.connected.set()

    def _listen(self) -> None:
        try:
            if self.store is None:
                self._connect()
            self.store.clone().wait([self.key], timedelta(days=1000))
            if self.ending.is_set():
                return
            code = int(json.loads(self.store.get(self.key))["code"])
            self._hear()
        except RuntimeError:  # the store is gone, and the job with it
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _hear(self) -> None:
        """Let the rank that tells go on; whose process has the store ends last."""
        self.store.add(self.heard, 1)
        if self.host:
            self._until(lambda: self.store.check([self.done]), _PATIENCE)
            time.sleep(_LAST)

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)

    def tell(self, code: int, reason: str | None) -> tuple[int, bool]:
        self.ending.set()
        if not self.connected.wait(_PATIENCE):
            return code, True
        mine = {"rank": self.rank, "code": code, "reason": reason}
        try:
            first = json.loads(self.store.compare_set(self.key, "", json.dumps(mine)))
            if first["rank"] == self.rank:  # torchrun must not see this rank end before the others
                self.store.add(self.heard, 1)
                # the dead do not hear; and where an agent has the store, it ends the others
                patience = _PATIENCE if reason is not None else _FOR_THE_DEAD if self.host else 0.0
                self._until(lambda: self.store.add(self.heard, 0) >= self.ranks, patience)
                self.store.set(self.done, "1")
                time.sleep(_LAST if self.host else 0)
            else:
                self._hear()
        except RuntimeError:
            return code, True
        return int(first["code"]), first["rank"] == self.rank or reason not in (None, first["reason"])
