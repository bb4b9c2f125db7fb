"""The run's event log: one JSON object a line in DIR/events.jsonl, appended by any rank, never rewritten."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_opt import run_files

_path: Path | None = None


def open_log(folder: str | os.PathLike[str] | None, make: bool = True) -> None:
    """Send this process's events to `folder`/events.jsonl; None sends them nowhere, as does a folder that is not there."""
    global _path
    _path = Path(folder) / run_files.EVENTS if folder else None
    if _path and make:
        _path.parent.mkdir(parents=True, exist_ok=True)


def record(event: str, **fields: Any) -> None:
    """Append one event with time, rank, host and restart count; a full disk must not end a run, so errors pass.

    One write() of one line with O_APPEND: ranks of a host do not tear each other's lines.
    """
    if _path is None:
        return
    entry = {
        "time": round(time.time(), 3),
        "event": event,
        "rank": int(os.environ.get("RANK", "0")),
        "host": socket.gethostname(),
        "restart": restarts(),
        **fields,
    }
    try:
        descriptor = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError:
        pass


def start(args: Any) -> None:
    """Rank 0's first event of a process: how far this run is to go, on what."""
    if int(os.environ.get("RANK", "0")) == 0:
        record(
            "restart" if restarts() else "start",
            train_iters=args.train_iters,
            world_size=args.world_size,
            global_batch_size=args.global_batch_size,
            seq_length=args.seq_length,
            optimizer=args.optimizer,
            save=args.save,
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            layout={
                "tp": args.tensor_model_parallel_size,
                "pp": args.pipeline_model_parallel_size,
                "cp": args.context_parallel_size,
                "dp": args.data_parallel_size,
            },
        )


def restarts() -> int:
    """Restarts of this job so far: torchrun's of its ranks plus Slurm's of the job."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(os.environ.get(name) or 0) for name in names)


read = run_files.events
