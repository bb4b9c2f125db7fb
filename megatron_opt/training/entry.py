"""How a command that is one rank of a job starts, refuses and ends."""

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
    """End the process; a failed rank ends at once, since others may wait for it in a collective until torchrun ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(code)
