"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.table import Table


def make_console() -> Console:
    """The terminal, or 180 columns where there is none, so that files get whole tables."""
    console = Console()
    return console if console.is_terminal else Console(width=180)


def print_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None
) -> None:
    """A table; on a narrow or dumb terminal rich folds it."""
    table = Table(*header, title=title, title_justify="left")
    for column, name in zip(table.columns, header):
        column.overflow = "fold"
        column.justify = "left" if name in ("optimizer", "regime", "phase", "run id") else "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of equally many cells as lines of plain text, columns two apart; those in `left` begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
