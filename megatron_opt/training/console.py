"""What a run shows and what it keeps: our lines on the terminal, everything in OUTPUT/logs/rank-N.txt.

Megatron's lines go to the log alone, unless `--megatron-log`; a warning is shown once.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

_screen: TextIO | None = None  # the terminal, where standard output goes elsewhere
_log: "_Log | None" = None
_said: set[str] = set()

HEADER = (
    f"{'step':>15}  {'loss':>8}  {'lr':>9}  {'grad norm':>9}  {'tokens/s':>11}  {'MFU':>5}  {'step ms':>9}  "
    f"{'memory':>9}  {'ETA':>8}"
)
_EVERY = 40  # lines between headers
_PEAKS = {  # dense bf16 FLOP/s
    "GB300": 2500e12, "B300": 2500e12, "GB200": 2500e12, "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12,
}  # fmt: skip


class _Both(io.TextIOBase):
    """Writes to two streams."""

    def __init__(self, first: TextIO, second: "TextIO | _Log") -> None:
        self.first, self.second = first, second

    def write(self, text: str) -> int:
        self.first.write(text)
        self.second.write(text)
        return len(text)

    def flush(self) -> None:
        self.first.flush()
        self.second.flush()

    def isatty(self) -> bool:
        return self.first.isatty()

    def fileno(self) -> int:
        return self.first.fileno()


class _Log(io.TextIOBase):
    """The log's file; a full disk must not end a run for its log, so errors pass."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115  (as long as the process)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()


def start(args: Any) -> None:
    """From here on, what this process prints goes to its log; `say` goes to the terminal too."""
    global _screen, _log
    if _log is not None or _screen is not None:
        return
    path = os.devnull
    if args.output_dir:
        folder = Path(args.output_dir) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / f"rank-{args.rank}.txt")
    log = _log = _Log(path)
    sys.stdout.flush()
    if args.megatron_log:
        sys.stdout = _Both(sys.stdout, log)  # type: ignore[assignment]
    else:
        _screen = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8", errors="replace")
        os.dup2(log.fileno(), 1)
        sys.stdout = log  # type: ignore[assignment]
    sys.stderr = _Both(sys.stderr, log)  # type: ignore[assignment]
    first = args.rank == 0

    def shown(message: Any, category: Any, filename: str, line: int, *_: Any, **__: Any) -> None:
        assert _log is not None
        _log.write(f"{filename}:{line}: {category.__name__}: {message}\n")
        if first and issubclass(category, UserWarning):
            _once(f"warning: {' '.join(str(message).split())[:300]}")

    warnings.showwarning = shown  # type: ignore[assignment]
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:  # basicConfig's
        root.removeHandler(handler)
    root.addHandler(_Records(first))


class _Records(logging.Handler):
    """Log records: all to the log, those above warnings to the terminal too."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self._first = first

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        assert _log is not None
        _log.write(f"{record.levelname} {record.name}: {text}\n")
        if self._first and record.levelno > logging.WARNING:
            _once(f"{record.levelname.lower()}: {' '.join(text.split())[:300]}")


def keep(text: str) -> None:
    """For the log alone."""
    if _log is not None:
        _log.write(text + "\n")


def say(text: str) -> None:
    """A line for the terminal and the log."""
    if _screen is not None:
        print(text, file=_screen, flush=True)
    print(text, flush=True)


@contextmanager
def showing() -> Iterator[None]:
    """What is printed while this is open was asked for: it goes to the terminal too."""
    if _screen is None or _log is None:
        yield
        return
    with redirect_stdout(_Both(_screen, _log)):
        yield


def note(text: str) -> None:
    """Something to be known, said once a run's process."""
    _once(f"note: {text}")


def _once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        say(text)


def clock(seconds: float) -> str:
    """h:mm:ss, or days and hours."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours // 24}d {hours % 24:02d}h" if hours >= 100 else f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class Table:
    """One aligned line a log interval."""

    def __init__(self, train_iters: int | None, peak: float | None) -> None:
        self.train_iters, self.peak, self._lines = train_iters, peak, 0

    def row(
        self, iteration: int, loss: float | None, lr: float | None, norm: float | None, seconds: float,
        tokens_per_s: float, flops_per_s: float | None, ranks: int, memory: int,
    ) -> str:  # fmt: skip
        """The line; the header before every fortieth."""

        def number(value: float | None, form: str) -> str:
            return "–" if value is None else format(value, form)

        mfu = f"{flops_per_s / (self.peak * ranks):.1%}" if self.peak and flops_per_s else "–"
        left = clock((self.train_iters - iteration) * seconds) if self.train_iters else "–"
        size = f"{memory / 2**30:.2f} GiB" if memory >= 2**30 else f"{memory / 2**20:.0f} MiB"
        step = f"{iteration}/{self.train_iters}" if self.train_iters else str(iteration)
        line = (
            f"{step:>15}  {number(loss, '.4f'):>8}  {number(lr, '.3e'):>9}  {number(norm, '.4g'):>9}  "
            f"{tokens_per_s:>11,.0f}  {mfu:>5}  {seconds * 1e3:>9.1f}  {size:>9}  {left:>8}"
        )
        head = HEADER + "\n" if self._lines % _EVERY == 0 else ""
        self._lines += 1
        return head + line


def peak_flops(args: Any) -> float | None:
    """The device's dense bf16 rate, FLOP/s, where it is known and used; Nvidia's data sheets."""
    import torch

    if not args.bf16 or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for word, peak in _PEAKS.items() if word in name), None)
