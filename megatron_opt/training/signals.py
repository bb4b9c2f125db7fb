"""SIGTERM and SIGUSR1: save at the end of the step and leave with 128 + the signal's number (143, 138).

Megatron's `--exit-signal-handler` knows one signal and leaves with 0, which schedulers read as a finished job.
"""

import ctypes
import functools
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_opt import patches
from megatron_opt.training import events

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1

_handler: "ExitSignals | None" = None


class ExitSignals:
    """Stands where Megatron keeps its DistributedSignalHandler; every rank learns of a signal to any rank."""

    def __init__(self) -> None:
        self.received = 0
        self.agreed = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def signals_received(self) -> list[int]:
        """Signal number by rank, 0 for none; a collective."""
        import torch
        from megatron.training.dist_signal_handler import all_gather_item

        numbers: list[int] = all_gather_item(self.received, dtype=torch.int32)
        self.agreed = max(numbers)
        if self.agreed and torch.distributed.get_rank() == 0:
            events.record("signal", signal=signal.Signals(self.agreed).name, ranks=sum(map(bool, numbers)))
        return numbers

    def release(self) -> None:
        """Megatron calls it at its end."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def install(args: Any) -> None:
    """Listen to both signals from the first step on where there is a folder to save to; before, they end a rank."""
    if not args.save:
        return

    def listening(train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def run(*positional: Any, **named: Any) -> Any:
            global _handler
            _handler = ExitSignals()
            patches.wrap(
                "megatron.training.global_vars._GLOBAL_SIGNAL_HANDLER", "training/signals.py", lambda _: _handler
            )
            return train(*positional, **named)

        return run

    args.exit_signal_handler = True
    patches.wrap("megatron.training.training.train", "training/signals.py", listening)


def exit_code(code: int) -> int:
    """The process's exit code: 128 + n where signal n ended the training, else `code`."""
    return 128 + _handler.agreed if _handler is not None and _handler.agreed and code == 0 else code


def received() -> str | None:
    """Name of the signal that ends the training, or None."""
    return signal.Signals(_handler.agreed).name if _handler is not None and _handler.agreed else None


def die_with_launcher() -> None:
    """Under torchrun, be killed when it is: ranks without an agent would go on beside their replacements."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def serve_parent() -> None:
    """For a helper process of a rank: live as long as it does, and leave signals to the whole group to it."""
    die_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
