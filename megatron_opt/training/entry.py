"""How a command that is one rank of a job starts, refuses and ends."""

import atexit
import os
import sys
from typing import NoReturn


def alone() -> None:
    """Addresses for torch.distributed where there is one process, which needs no launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "0")


def refused(program: str, error: Exception) -> int:
    """Print why this rank stops, with its number where there are several; returns the exit code of bad input."""
    rank = os.environ.get("RANK", "0")
    where = f" [rank {rank}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    print(f"{program}{where}: {error}", file=sys.stderr, flush=True)
    return 2


def part() -> None:
    """End this rank's process group, whose threads may otherwise abort the process at its end (gloo)."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process without taking the interpreter down: threads of gloo and torch abort a rank now and then while their
    libraries are unloaded, and a launcher would start a finished job again. A failed rank ends at once, since others may
    wait for it in a collective until torchrun ends them; a good end lets loggers write first.
    """
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
