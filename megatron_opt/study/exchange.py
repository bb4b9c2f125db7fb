"""Runs as CSV or Parquet files: out of a store, into a store, and in from elsewhere.

An exported file holds everything of a run but its curve, and what reports read of the study as a whole; curves go into a
Parquet file of their own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opt.errors import UserError
from megatron_opt.files import replacing_output
from megatron_opt.report.csv_files import write_csv
from megatron_opt.study import curves
from megatron_opt.study.imports.mapping import Mapping
from megatron_opt.study.imports.values import final_loss
from megatron_opt.study.store import REAL, STATES, WHOLE, Record, Store
from megatron_opt.study.store import TEXT as STORED_TEXT

TEXT = (*STORED_TEXT, "phases", "study")
COLUMNS = (*TEXT, *WHOLE, *REAL)
REQUIRED = ("optimizer", "model", "ratio", "parameters", "tokens", "loss")
"""what a file that another program wrote must have; `hyper` is a JSON object, an empty loss means diverged"""


def phases_by_run(phases: dict[str, list[str]]) -> dict[str, list[str]]:
    """Runs of each phase as phases of each run."""
    found: dict[str, list[str]] = {}
    for phase, runs in phases.items():
        for run in runs:
            found.setdefault(run, []).append(phase)
    return found


def complete(
    rows: list[dict[str, Any]], phases: dict[str, list[str]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows with each run's phases and, in the row of the lowest id, what is known of the study (`Store.settings`)."""
    of_run, first = phases_by_run(phases), min((row["id"] for row in rows), default=None)
    return [
        row
        | {"phases": json.dumps(of_run.get(row["id"], []))}
        | {"study": json.dumps(settings) if settings and row["id"] == first else None}
        for row in rows
    ]


def export_runs(store: Store, path: Path) -> int:
    """Write all runs to a .csv or .parquet file; returns how many."""
    rows = complete(store.rows(), store.phases(), store.settings())
    if path.suffix == ".parquet":
        schema = pa.schema(
            [(name, pa.string()) for name in TEXT]
            + [(name, pa.int64()) for name in WHOLE]
            + [(name, pa.float64()) for name in REAL]
        )
        table = pa.table({name: [row[name] for row in rows] for name in COLUMNS}, schema=schema)
        with replacing_output(path) as stream:
            pq.write_table(table, stream, compression="zstd")
    elif path.suffix == ".csv":
        write_csv(path, COLUMNS, [[row[name] for name in COLUMNS] for row in rows])
    else:
        raise UserError(f"cannot tell the format of {path}; end its name in .csv or .parquet")
    return len(rows)


def row_of(record: Record) -> dict[str, Any]:
    """A run in the columns of an export that are its own."""
    row: dict[str, Any] = {name: getattr(record, name, None) for name in COLUMNS}
    row |= {"model": record.regime.model, "ratio": record.regime.ratio}
    row |= {name: json.dumps(getattr(record, name)) for name in ("hyper", "config", "arguments")}
    return row | {"results": json.dumps(record.results) if record.results else None}


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
    with replacing_output(path) as stream:
        pq.write_table(pa.concat_tables(tables), stream, compression="zstd")
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
        imported, left = megatron.read_tensorboard(path, megatron.TAG if tag == "loss" else tag)
    elif kind == "megatron-log":
        imported, left = megatron.read_logs(path)
    elif kind == "json":
        imported = tables.read_json(path, mapping.records)
    else:
        imported = {"csv": tables.read_csv, "parquet": tables.read_parquet, "wandb-history": tables.read_history}[kind](
            path
        )
    rows, notes = rows_of(imported, mapping)
    return [
        _row(row | {"hyper": json.dumps(row["hyper"]), "config": json.dumps(row["config"])}, path, k)
        for k, row in enumerate(rows, start=1)
    ], left + notes


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
    curve_of = {}
    for run in table.column("run").unique().to_pylist():
        part = table.filter(pa.compute.equal(table.column("run"), run)).drop_columns(["run"])
        buffer = io.BytesIO()
        pq.write_table(part.cast(pa.schema(curves.COLUMNS.items())), buffer, compression="zstd")
        curve_of[run] = buffer.getvalue()
    return curve_of


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
        phases, settings = json.loads(row["phases"] or "[]"), json.loads(row["study"] or "{}")
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}, row {number}: {error}; correct the value") from None
    where = f"{path}, row {number}, column 'loss'"
    if not row["optimizer"] or not row["model"] or row["ratio"] is None or row["parameters"] <= 0:
        raise UserError(f"{path}, row {number}: optimizer, model, ratio and parameters must be given")
    if not math.isfinite(row["ratio"]) or row["ratio"] <= 0 or row["tokens"] <= 0:
        raise UserError(f"{path}, row {number}: ratio and tokens must be greater than 0")
    for column, value in (("hyper", hyper), ("study", settings)):
        if not isinstance(value, dict):
            raise UserError(f'{path}, row {number}: `{column}` must be a JSON object, such as {{"lr": 0.01}}')
    row["loss"], row["status"] = _outcome(row["loss"], row["status"], where)
    row |= {
        "hyper": json.dumps(hyper),
        "config": row["config"] or "{}",
        "arguments": row["arguments"] or "[]",
        "results": row["results"] or None,
        "reason": row["reason"] or None,
        "phases": phases,
        "study": settings,
        "created": row["created"] or time.time(),
    }
    if not row["id"]:
        known = [row[name] for name in ("optimizer", "model", "ratio", "seed", "tokens")] + [hyper]
        run = json.loads(row["config"]).get("run")
        text = json.dumps(known if run is None else [*known, run])
        row["id"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return row


def _outcome(loss: float | None, status: str | None, where: str) -> tuple[float | None, str]:
    """Loss and status that agree: no loss, inf or NaN is a diverged run; a loss in nats is greater than 0."""
    if status and status not in STATES:
        raise UserError(f"{where}: no status {status!r}; there are {', '.join(STATES)}, or leave it empty")
    if status == "completed" and loss is not None and not math.isfinite(loss):
        raise UserError(f"{where}: a completed run with the loss {loss}; leave `loss` empty for one that diverged")
    loss = final_loss(loss, where)
    status = status or ("diverged" if loss is None else "completed")
    if status == "completed" and loss is None:
        raise UserError(f"{where}: a completed run without a loss; leave `status` empty, or say diverged")
    if status != "completed" and loss is not None:
        raise UserError(f"{where}: a loss of {loss:g} with status {status!r}; only completed runs have one")
    # A run that was under way elsewhere is not under way here.
    return loss, "planned" if status == "running" else status
