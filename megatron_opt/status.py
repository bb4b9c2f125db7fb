"""`megatron-opt status DIR`: what a run is doing, read from the files it writes; needs neither torch nor its host."""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opt.checkpointing import folders
from megatron_opt.errors import UserError
from megatron_opt.training import events

_RECENT = 20  # training lines that speed and time to end are taken from
_QUIET = 10  # a run that has not written for so many of its steps (and 60 s) is called silent


@dataclass
class Status:
    """One look at a run; None where its files do not tell (yet)."""

    state: str = "no such run"
    iteration: int | None = None
    train_iters: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    age: float | None = None  # seconds since the run last wrote
    world_size: int | None = None
    restarts: int = 0
    checkpoint: int | None = None
    checkpoint_age: float | None = None
    counts: dict[str, int] = field(default_factory=dict)  # skips, rollbacks, hangs, damaged checkpoints, failed saves
    last_trouble: str | None = None


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line may be half written
            continue
    return rows


_TROUBLE = ("skip", "rollback", "hang", "straggler", "damaged", "save_failed")


def look(folder: Path, now: float | None = None) -> Status:
    """Read a run's folder (--output-dir); checkpoints are looked for where its start event says they go."""
    now = time.time() if now is None else now
    log = events.read(folder)
    metrics = _lines(folder / "metrics.jsonl")
    if not log and not metrics:
        raise UserError(
            f"{folder} holds no run: there is neither {events.FILE} nor metrics.jsonl; give its --output-dir."
        )
    status = Status(state="starting")
    starts = [entry for entry in log if entry["event"] in ("start", "restart")]
    if starts:
        status.train_iters, status.world_size = starts[-1].get("train_iters"), starts[-1].get("world_size")
    status.restarts = max(0, len(starts) - 1)
    status.counts = {name: n for name in _TROUBLE if (n := sum(entry["event"] == name for entry in log))}
    troubled = [entry for entry in log if entry["event"] in _TROUBLE]
    if troubled:
        last = troubled[-1]
        reason = last.get("reason") or last.get("loss") or f"ranks {last.get('guilty')}"
        status.last_trouble = f"{last['event']} at iteration {last.get('iteration')}: {reason}"
    _progress(status, metrics)
    saves = [entry for entry in log if entry["event"] == "save"]
    if saves:
        status.iteration = max(status.iteration or 0, saves[-1]["iteration"]) if not metrics else status.iteration
        status.checkpoint_age = now - saves[-1]["time"]
        status.checkpoint = saves[-1]["iteration"]
    save = Path(starts[-1]["save"]) if starts and starts[-1].get("save") else None
    if save is not None and save.is_dir():
        status.checkpoint = next(iter(folders.iterations(save)), None)
    written = [path.stat().st_mtime for name in (events.FILE, "metrics.jsonl") if (path := folder / name).is_file()]
    status.age = now - max(written)
    status.state = _state(status, folder, log, metrics, max(written))
    if status.state != "running":
        status.seconds_left = None
    return status


def _progress(status: Status, metrics: list[dict[str, Any]]) -> None:
    train = [row for row in metrics if row.get("kind") == "train"]
    evals = [row for row in metrics if row.get("kind") == "eval" and row.get("split", "valid") == "valid"]
    if train:
        last, recent = train[-1], train[-_RECENT:]
        status.iteration, status.loss = last["iteration"], last.get("loss")
        rates = [row["tokens_per_s"] for row in recent if row.get("tokens_per_s")]
        status.tokens_per_s = statistics.median(rates) if rates else None
        times = [row["step_time"] for row in recent if row.get("step_time")]
        if times and status.train_iters:
            status.seconds_left = (status.train_iters - last["iteration"]) * statistics.median(times)
    if evals:
        status.valid_loss = evals[-1].get("loss")


def _state(
    status: Status, folder: Path, log: list[dict[str, Any]], metrics: list[dict[str, Any]], written: float
) -> str:
    if log and log[-1]["event"] == "failed":
        return f"failed with exit code {log[-1]['code']}"
    result = folder / "results.json"
    if result.is_file() and result.stat().st_mtime >= written - 60:
        return str(json.loads(result.read_text()).get("status", "completed"))
    if log and log[-1]["event"] == "signal":
        return f"left on {log[-1]['signal']}"
    if not metrics and status.iteration is None:
        return "starting"
    steps = [row["step_time"] for row in metrics[-_RECENT:] if row.get("step_time")]
    patience = max(60.0, _QUIET * statistics.median(steps) if steps else 60.0)
    return "running" if status.age is not None and status.age <= patience else "silent"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def table(status: Status) -> str:
    """The status in lines for a terminal."""

    def number(value: float | None, form: str) -> str:
        return "?" if value is None else format(value, form)

    done = f" ({100 * status.iteration / status.train_iters:.1f}%)" if status.iteration and status.train_iters else ""
    rows = [
        ("state", f"{status.state}, last sign {_duration(status.age)} ago"),
        ("step", f"{number(status.iteration, 'd')} of {number(status.train_iters, 'd')}{done}"),
        ("loss", f"{number(status.loss, '.4f')} (validation {number(status.valid_loss, '.4f')})"),
        ("speed", f"{number(status.tokens_per_s, ',.0f')} tokens/s on {number(status.world_size, 'd')} ranks"),
        ("time to end", _duration(status.seconds_left)),
        ("restarts", str(status.restarts)),
        (
            "checkpoint",
            "none"
            if status.checkpoint is None
            else f"iteration {status.checkpoint}, {_duration(status.checkpoint_age)} ago",
        ),
    ]
    if status.counts:
        rows.append(("trouble", ", ".join(f"{n} × {name}" for name, n in status.counts.items())))
    if status.last_trouble:
        rows.append(("last of it", status.last_trouble))
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def main(argv: list[str], prog: str = "megatron-opt status") -> int:
    """Print a run's status once, or again and again."""
    parser = argparse.ArgumentParser(prog=prog, description="What a run is doing, from its --output-dir.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the run's --output-dir")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="repeat until the run ends or Ctrl-C")
    args = parser.parse_args(argv)
    if args.watch is not None and args.watch <= 0:
        raise UserError(f"--watch {args.watch:g} is no pause; give seconds above 0.")
    try:
        while True:
            status = look(args.folder)
            text = json.dumps(vars(status)) if args.json else table(status)
            clear = "\033[H\033[2J" if args.watch and sys.stdout.isatty() else ""
            print(clear + text, flush=True)
            if args.watch is None or status.state.startswith(("completed", "diverged", "interrupted", "failed")):
                return 0
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 0
