"""What the terminal shows of a study: a live view while it runs, tables when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from megatron_opt.report.terminal import print_table
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.scheduler import Scheduler
from megatron_opt.study.store import FINISHED, Record, Store
from megatron_opt.study.summary import HEADER, summary

NARROW = ["regime", "optimizer", "best lr", "valid loss", "tokens/s", "optimizer ms", "runs"]
STATES = ("completed", "diverged", "running", "planned", "failed")


def print_summary(console: Console, dataset: Dataset) -> None:
    """The result table of a study; a narrow terminal gets its most important columns."""
    rows = [row.cells() for row in summary(dataset)]
    wanted = HEADER if console.width >= 140 else NARROW
    keep = [HEADER.index(name) for name in wanted]
    print_table(console, wanted, [[row[i] for i in keep] for row in rows], f"{dataset.name}: best of each optimizer")


def counts(records: list[Record]) -> list[list[str]]:
    """One row an optimizer: how many runs in each state, and the best loss so far."""
    names = sorted({record.optimizer for record in records})
    rows = []
    for name in names:
        mine = [record for record in records if record.optimizer == name]
        losses = [record.loss for record in mine if record.loss is not None]
        rows.append(
            [
                name,
                *(str(sum(r.status == state for r in mine)) for state in STATES),
                f"{min(losses):.4f}" if losses else "–",
            ]
        )
    return rows


def last_point(folder: Path) -> dict[str, Any]:
    """The newest training point in metrics.jsonl, read from the file's end."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and point.get("kind") == "train":
            return point
    return {}


def live_view(records: list[Record], folder: Path, spent_hours: float) -> Group:
    """Counts of every optimizer and the progress of each running run."""
    table = Table("optimizer", *STATES, "best loss")
    for row in counts(records):
        table.add_row(*row)
    running = Table("running", "regime", "lr", "iteration", "", "loss", "tokens/s", box=None)
    for record in records:
        if record.status == "running":
            point, total = last_point(folder / record.id), record.config["flags"].get("train-iters", 1)
            done = point.get("iteration", 0)
            running.add_row(
                record.optimizer,
                str(record.regime),
                f"{record.hyper.get('lr', 0):g}",
                f"{done}/{total}",
                ProgressBar(total, done, width=20),
                f"{point['loss']:.3f}" if point.get("loss") else "–",
                f"{point.get('tokens_per_s', 0):,.0f}",
            )
    finished = sum(record.status in FINISHED for record in records)
    line = f"{finished} of {len(records)} known runs finished, {spent_hours:.2f} h of training"
    return Group(table, running, line)


class Observer:
    """Called by the scheduler in every round: a live view on a terminal, else a line for each
    finished run.
    """

    def __init__(self, console: Console, store: Store, live: Live | None):
        self._console, self._store, self._live = console, store, live
        self._next, self._seen = 0.0, {r.id for r in store.runs() if r.status in (*FINISHED, "failed")}

    def __call__(self, scheduler: Scheduler) -> None:
        if time.monotonic() < self._next:
            return
        started = time.monotonic()
        self.update(scheduler)
        # A large store takes a while to read; watching it must not take more than a tenth of the time.
        self._next = time.monotonic() + max(1.0, 10 * (time.monotonic() - started))

    def update(self, scheduler: Scheduler) -> None:
        """Draw or print what is new, now."""
        records = self._store.runs()
        if self._live is not None:
            self._live.update(live_view(records, scheduler.output / "runs", scheduler.spent_hours))
            return
        for record in records:
            if record.status in (*FINISHED, "failed") and record.id not in self._seen:
                self._seen.add(record.id)
                outcome = f"valid loss {record.loss:.4f}" if record.loss is not None else record.status
                values = " ".join(f"{key}={value}" for key, value in record.hyper.items())
                self._console.print(
                    f"[{len(self._seen)}/{len(records)}] {record.optimizer} {record.regime} {values}: {outcome}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )


@contextmanager
def observe(console: Console, store: Store) -> Iterator[Observer]:
    """The observer of one `study run`."""
    if not console.is_terminal:
        yield Observer(console, store, None)
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        yield Observer(console, store, live)
