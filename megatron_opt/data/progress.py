"""Progress on standard error: live bars on a terminal, nothing in a log file."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def _console() -> Console:
    return Console(stderr=True)


def byte_progress() -> Progress:
    """A bar of bytes done, with speed and remaining time."""
    console = _console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)


def spinner() -> Progress:
    """A spinner with the elapsed time, for work that tells nothing about its progress."""
    console = _console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
