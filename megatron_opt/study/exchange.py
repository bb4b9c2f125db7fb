"""Runs as CSV or Parquet files: out of a store, into a store, and in from elsewhere.

An exported file holds everything of a run but its curve; curves go into a Parquet file of their own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opt.errors import UserError
from megatron_opt.study import curves
from megatron_opt.study.files import replace_with, write_text
from megatron_opt.study.imports.mapping import Mapping
from megatron_opt.study.imports.values import final_loss
from megatron_opt.study.store import Store

TEXT = ("id", "optimizer", "model", "hyper", "config", "arguments", "status", "results", "reason", "phases")
WHOLE = ("seed", "parameters", "tokens", "attempts", "interruptions")
REAL = ("ratio", "created", "started", "finished", "loss")
COLUMNS = (*TEXT, *WHOLE, *REAL)
REQUIRED = ("optimizer", "model", "ratio", "parameters", "tokens", "loss")
"""what a file that another program wrote must have; `hyper` is a JSON object, an empty loss means diverged"""


def export_runs(store: Store, path: Path) -> int:
    """Write all runs to a .csv or .parquet file; returns how many."""
    phases: dict[str, list[str]] = {}
    for phase, runs in store.phases().items():
        for run in runs:
            phases.setdefault(run, []).append(phase)
    rows = [row | {"phases": json.dumps(phases.get(row["id"], []))} for row in store.rows()]
    if path.suffix == ".parquet":
        schema = pa.schema(
            [(name, pa.string()) for name in TEXT]
            + [(name, pa.int64()) for name in WHOLE]
            + [(name, pa.float64()) for name in REAL]
        )
        table = pa.table({name: [row[name] for row in rows] for name in COLUMNS}, schema=schema)
        with replace_with(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    elif path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
    else:
        raise UserError(f"cannot tell the format of {path}; end its name in .csv or .parquet")
    return len(rows)


def export_curves(store: Store, path: Path) -> int:
    """Write every curve to one Parquet file with a `run` column; returns how many runs have one."""
    tables = []
    for row in store.rows():
        parquet = store.curve_bytes(row["id"])
        if parquet is not None:
            table = pq.read_table(io.BytesIO(parquet))
            tables.append(table.add_column(0, "run", pa.array([row["id"]] * len(table), pa.string())))
    if not tables:
        raise UserError(f"{store.path} has no curves yet; run the study first")
    with replace_with(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary, compression="zstd")
    return len(tables)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Rows of a store from a .csv or .parquet file; raises UserError."""
    return [_row(row, path, number) for number, row in enumerate(_read(path), start=2)]


def read_foreign(path: Path, kind: str, mapping: Mapping) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a store from another program's file or folder, and notes on what was left out; raises UserError."""
    from megatron_opt.study.imports import megatron, tables
    from megatron_opt.study.imports.mapping import rows_of

    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or folder")
    left: list[str] = []
    if kind == "tensorboard":
        tag = mapping.columns.get("loss", "loss")
        found, left = megatron.read_tensorboard(path, megatron.TAG if tag == "loss" else tag)
    elif kind == "megatron-log":
        found, left = megatron.read_logs(path)
    elif kind == "json":
        found = tables.read_json(path, mapping.records)
    else:
        found = {"csv": tables.read_csv, "parquet": tables.read_parquet, "wandb-history": tables.read_history}[kind](
            path
        )
    rows, notes = rows_of(found, mapping)
    return [
        _row(row | {"hyper": json.dumps(row["hyper"]), "config": json.dumps(row["config"])}, path, k)
        for k, row in enumerate(rows, start=1)
    ], left + notes


def import_runs(store: Store, path: Path, curve_path: Path | None = None) -> int:
    """Add the runs of a .csv or .parquet file; all of them or, with a UserError, none."""
    return store.import_runs(read_runs(path), read_curves(curve_path))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {path}: {error}; check the file") from None
    raise UserError(f"cannot tell the format of {path}; end its name in .csv or .parquet")


def read_curves(path: Path | None) -> dict[str, bytes]:
    """Curves by run from a file of `export_curves`; none without a file."""
    if path is None:
        return {}
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {path}: {error}; check the file") from None
    found = {}
    for run in table.column("run").unique().to_pylist():
        part = table.filter(pa.compute.equal(table.column("run"), run)).drop_columns(["run"])
        buffer = io.BytesIO()
        pq.write_table(part.cast(pa.schema(curves.COLUMNS.items())), buffer, compression="zstd")
        found[run] = buffer.getvalue()
    return found


def _row(raw: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    """A row of the store from a row of a file, with what is missing filled in."""
    lacking = [name for name in REQUIRED if name not in raw]
    if lacking:
        raise UserError(f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(raw)}")
    row: dict[str, Any] = {name: raw.get(name) for name in COLUMNS}
    try:
        for name in WHOLE:
            row[name] = int(float(row[name])) if row[name] not in (None, "") else 0
        for name in REAL:
            row[name] = float(row[name]) if row[name] not in (None, "") else None
        hyper = json.loads(row["hyper"] or "{}")
        phases = json.loads(row["phases"] or "[]")
    except ValueError as error:
        raise UserError(f"{path}, row {number}: {error}; correct the value") from None
    where = f"{path}, row {number}, column 'loss'"
    loss = final_loss(row["loss"], where)
    if row["status"] == "completed" and loss is None:
        raise UserError(
            f"{where}: a completed run has the loss {raw['loss']!r}; give a finite one, or the status diverged"
        )
    row["loss"] = loss
    if not row["optimizer"] or not row["model"] or row["ratio"] is None or row["parameters"] <= 0:
        raise UserError(f"{path}, row {number}: optimizer, model, ratio and parameters must be given")
    row |= {
        "hyper": json.dumps(hyper),
        "config": row["config"] or "{}",
        "arguments": row["arguments"] or "[]",
        "results": row["results"] or None,
        "reason": row["reason"] or None,
        "phases": phases,
        "status": row["status"] or ("diverged" if row["loss"] is None else "completed"),
        "created": row["created"] or time.time(),
    }
    if not row["id"]:
        known = [row[name] for name in ("optimizer", "model", "ratio", "seed", "tokens")] + [hyper]
        run = json.loads(row["config"]).get("run")
        text = json.dumps(known if run is None else [*known, run])
        row["id"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    # A run that was under way elsewhere is not under way here.
    row["status"] = "planned" if row["status"] == "running" else row["status"]
    return row
