"""How a command that is one rank of a job starts, refuses and ends."""

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_opt.errors import UserError
from megatron_opt.training import failing


def set_single_process_env() -> None:
    """Addresses for torch.distributed where there is one process, which needs no launcher."""
    if check_launcher()[1] == 1:
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "0")


def check_launcher() -> tuple[int, int]:
    """(rank, ranks) that a launcher's variables give this process; raises UserError where they cannot be meant."""
    ranks = _whole("WORLD_SIZE", 1, 2**31, "1")
    rank = _whole("RANK", 0, ranks - 1, "0")
    _whole("LOCAL_RANK", 0, ranks - 1, "0")
    _whole("MASTER_PORT", 0 if ranks == 1 else 1, 65535, "1")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if ranks > 1 and not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {ranks} and {missing[0]} is not set; start the ranks by torchrun or Slurm's srun."
        )
    return rank, ranks


def _whole(name: str, low: int, high: int, default: str) -> int:
    text = os.environ.get(name, default)
    value = int(text) if text.strip().removeprefix("-").isdecimal() else None
    if value is None or not low <= value <= high:
        raise UserError(
            f"the environment variable {name} is {text!r}; it must be a whole number from {low} to {high}: unset it, or "
            "start the ranks by torchrun."
        )
    return value


def print_user_error(program: str, error: Exception, code: int = 2, of_another: bool = False) -> int:
    """End all ranks for bad input: print why, once, with the rank where there are several; returns the exit code.

    `of_another`: the error is that another rank is gone, which may have said why.
    """
    code, unsaid = failing.tell(code, None if of_another else str(error))
    rank = os.environ.get("RANK", "0")
    where = f" [rank {rank}]" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    if unsaid:
        print(f"{program}{where}: {error}", file=sys.stderr, flush=True)
    return code


def destroy_process_group() -> None:
    """End this rank's process group, whose threads may otherwise abort the process at its end (gloo)."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End the process without taking the interpreter down: threads of gloo and torch abort a rank now and then while their
    libraries are unloaded, and a launcher would start a finished job again. A failed rank ends at once, since others may
    wait for it in a collective until torchrun ends them; a good end lets loggers write first.
    """
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(main: Callable[[], int]) -> NoReturn:
    """End this process as `main` says; an exception that it raises is printed, and ends all ranks with 1."""
    try:
        code = main()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = failing.tell(1, f"{type(error).__name__}: {error}")[0]
    exit_process(code)
