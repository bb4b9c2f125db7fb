"""`megatron-opt status DIR`: what a run is doing, read from the files it writes; needs neither torch nor its host."""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opt import lifecycle, run_files
from megatron_opt.checkpointing import folders
from megatron_opt.errors import UserError, number

_RECENT = 20  # training lines that speed and time to end are taken from
_QUIET = 10  # a run that has not written for so many of its steps (and 60 s) is called silent
_START = 1800.0  # seconds that a start may take before the run is called so


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
    counts: dict[str, int] = field(default_factory=dict)  # skips, rollbacks, hangs, deaths, damaged checkpoints, …
    last_trouble: str | None = None


_OVER = ("completed", "diverged", "interrupted", "failed", "refused", "left")
_TROUBLE = ("skip", "rollback", "hang", "straggler", "damaged", "save_failed", "rank_died", "error")


def look(folder: Path, now: float | None = None) -> Status:
    """Read a run's folder (--output-dir); checkpoints are looked for where its start event says they go."""
    now = time.time() if now is None else now
    log = run_files.events(folder)
    metrics = run_files.metrics(folder / run_files.METRICS)
    if not log and not metrics:
        raise UserError(
            f"{folder} holds no run: there is neither {run_files.EVENTS} nor {run_files.METRICS}; give its --output-dir."
        )
    status = Status(state="starting")
    starts = [entry for entry in log if entry["event"] in lifecycle.STARTS]
    if starts:
        status.train_iters, status.world_size = starts[-1].get("train_iters"), starts[-1].get("world_size")
    status.restarts = max(0, len(starts) - 1)
    status.counts = {name: n for name in _TROUBLE if (n := sum(entry["event"] == name for entry in log))}
    troubled = [entry for entry in log if entry["event"] in _TROUBLE]
    if troubled:
        last = troubled[-1]
        status.last_trouble = _told(last)
    _progress(status, metrics)
    saves = [entry for entry in log if entry["event"] == "save"]
    if saves:
        status.iteration = max(status.iteration or 0, saves[-1]["iteration"]) if not metrics else status.iteration
        status.checkpoint_age = now - saves[-1]["time"]
        status.checkpoint = saves[-1]["iteration"]
    save = Path(starts[-1]["save"]) if starts and starts[-1].get("save") else None
    if save is not None and save.is_dir():
        status.checkpoint = next(iter(folders.iterations(save)), None)
    names = (run_files.EVENTS, run_files.METRICS)
    written = [path.stat().st_mtime for name in names if (path := folder / name).is_file()]
    status.age = now - max(written)
    status.state = _state(lifecycle.after(log), folder, metrics, status.age)
    if status.state != "running":
        status.seconds_left = None
    return status


def _told(event: dict[str, Any]) -> str:
    where = f" at iteration {event['iteration']}" if event.get("iteration") is not None else ""
    if event["event"] == "rank_died":
        return "; ".join(f"rank {rank} {how}" for rank, how in (event.get("ranks") or {}).items())
    reason = event.get("reason") or event.get("loss") or f"ranks {event.get('guilty')}"
    return f"{event['event']}{where}: {reason}"


def _progress(status: Status, metrics: list[dict[str, Any]]) -> None:
    train, evals = run_files.training(metrics), run_files.evaluations(metrics)
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


def _state(life: lifecycle.Life, folder: Path, metrics: list[dict[str, Any]], age: float) -> str:
    """The log's word; where it has none on an end or on steps, results and metrics written since the last start."""
    result, file = run_files.results(folder), folder / run_files.RESULTS
    if result is not None and life.phase not in ("failed", "refused", "ended", "stopped"):
        state = str(result.get("status", "completed"))
        if file.stat().st_mtime >= life.since and not (life.phase == "left" and state == "interrupted"):
            return state
    if life.phase not in ("unknown", "starting", "running"):
        return life.text
    if life.phase == "starting" and not _stepped(folder / run_files.METRICS, metrics, life.since):
        return "starting" if age <= _START else "silent"
    times = [row["step_time"] for row in metrics[-_RECENT:] if row.get("step_time")]
    patience = max(60.0, _QUIET * statistics.median(times) if times else 60.0)
    return "running" if age <= patience else "silent"


def _stepped(path: Path, metrics: list[dict[str, Any]], since: float) -> bool:
    if not metrics:
        return False
    if any("time" in row for row in metrics):
        return any(row.get("time", 0.0) >= since for row in metrics)
    return path.stat().st_mtime >= since


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
    parser.add_argument(
        "--watch", type=number(0, 1e6, above=True), metavar="SECONDS", help="repeat until the run ends or Ctrl-C"
    )
    args = parser.parse_args(argv)
    try:
        while True:
            status = look(args.folder)
            text = json.dumps(vars(status)) if args.json else table(status)
            clear = "\033[H\033[2J" if args.watch and sys.stdout.isatty() else ""
            print(clear + text, flush=True)
            if args.watch is None or status.state.startswith(_OVER):
                return 0
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 0
