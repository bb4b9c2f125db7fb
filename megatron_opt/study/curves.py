"""The curve of a run: metrics.jsonl in, one small Parquet table out."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opt import run_files

COLUMNS = {
    "kind": pa.string(),
    "iteration": pa.int64(),
    "tokens": pa.int64(),
    "loss": pa.float64(),
    "lr": pa.float64(),
    "grad_norm": pa.float64(),
    "step_time": pa.float64(),
    "tokens_per_s": pa.float64(),
    "extra": pa.string(),
}


_INTERNAL = ("split", "time", "run")  # of evaluations its set; of steps what a resumed run goes on from


@dataclass(frozen=True)
class Curve:
    """Training and evaluation points of one run, by iteration; `extra` holds further logged keys."""

    train: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)


def read_metrics(path: Path) -> Curve:
    """Read metrics.jsonl; of a step that was done twice the last counts, a torn line is skipped."""
    rows = run_files.metrics(path)
    return Curve(run_files.training(rows), run_files.evaluations(rows))


def to_parquet(curve: Curve) -> bytes:
    """The curve as a compressed Parquet table with the columns of COLUMNS."""
    table: dict[str, list] = {name: [] for name in COLUMNS}
    for point in curve.train + curve.valid:
        for name in COLUMNS:
            if name == "extra":
                extra = {key: value for key, value in point.items() if key not in (*COLUMNS, *_INTERNAL)}
                table[name].append(json.dumps(extra) if extra else None)
            else:
                table[name].append(point.get(name))
    buffer = io.BytesIO()
    pq.write_table(pa.table(table, schema=pa.schema(COLUMNS.items())), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> Curve:
    """The inverse of `to_parquet`."""
    rows = []
    for row in pq.read_table(io.BytesIO(data)).to_pylist():
        extra = json.loads(row.pop("extra") or "{}")
        rows.append({key: value for key, value in row.items() if value is not None} | extra)
    return Curve([row for row in rows if row["kind"] == "train"], [row for row in rows if row["kind"] == "eval"])
