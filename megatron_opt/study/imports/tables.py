"""CSV and Parquet with a run a row, W&B's exports of charts with a run a column, JSON and JSON lines with a run an object."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.study.imports.values import ImportedRow


def read_csv(path: Path) -> list[ImportedRow]:
    """One run a line; the first line names the columns."""
    return [ImportedRow(f"{path}, line {line}", row) for line, row in _csv(path)]


def _csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    wrong = "more" if None in row else "fewer"
                    raise UserError(f"{path}, line {reader.line_num}: {wrong} values than columns; correct the line")
                rows.append((reader.line_num, dict(row)))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}; check the file") from None


def read_parquet(path: Path) -> list[ImportedRow]:
    """One run a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {path}: {error}; check the file") from None
    return [ImportedRow(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]


def read_history(path: Path) -> list[ImportedRow]:
    """W&B's export of a chart: a column of steps, then `RUN - METRIC` (and __MIN, __MAX); the last value of each counts."""
    runs: dict[str, ImportedRow] = {}
    for line, row in _csv(path):
        for name, value in row.items():
            run, sign, metric = name.rpartition(" - ")
            if not sign or metric.endswith(("__MIN", "__MAX")) or value == "":
                continue
            run_row = runs.setdefault(run, ImportedRow("", {"run": run}))
            run_row.columns[metric], run_row.where = value, f"{path}, line {line}, run {run!r}"
    if not runs:
        raise UserError(f"{path} has no column `RUN - METRIC`; export the chart as CSV, or give `format: csv`")
    return list(runs.values())


def read_json(path: Path, records: str | None) -> list[ImportedRow]:
    """Objects flattened to dotted names; events of Levanter's JSON logger, also behind a log's prefix, are joined to a run."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .json or .jsonl file; name another folder")
    rows = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {file}: {error}; check the file") from None
        rows += _objects(file, text, records)
    return rows


def _objects(path: Path, text: str, records: str | None) -> list[ImportedRow]:
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}: {error}; correct the file") from None
        for key in records.split(".") if records else ():
            if not isinstance(content, dict) or key not in content:
                raise UserError(f"{path} has no key {records!r}; correct `records:` of the mapping")
            content = content[key]
        items = content if isinstance(content, list) else [content]
        return [
            ImportedRow(f"{path}, item {k}", _flat(item) | {"path": str(path)}) for k, item in enumerate(items, start=1)
        ]
    rows: list[ImportedRow] = []
    joined: ImportedRow | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        start = line.find("{")
        if start < 0:
            continue
        try:
            item = json.loads(line[start:])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; correct the line") from None
        if isinstance(item, dict) and "tracker" in item and "event" in item:
            joined = joined or ImportedRow("", {"path": str(path)})
            joined.where = f"{path}, line {number}"
            for key in ("hparams", "metrics", "summary"):
                joined.columns |= _flat(item.get(key) or {}, "hparams." if key == "hparams" else "")
            if item.get("step") is not None:
                joined.columns["step"] = item["step"]
            continue
        rows.append(ImportedRow(f"{path}, line {number}", _flat(item) | {"path": str(path)}))
    return rows + ([joined] if joined else [])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, names joined by dots; lists are kept as they are."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
