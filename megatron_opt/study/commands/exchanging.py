"""`study export` and `study import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opt.errors import UserError
from megatron_opt.study.exchange import export_curves, export_runs, read_curves, read_foreign, read_runs
from megatron_opt.study.imports.mapping import FORMATS, megatron_mapping, read_mapping
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import Store


def export(argv: list[str], prog: str) -> int:
    """Write the runs of a store to CSV or Parquet, and its curves to Parquet."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("--to", type=Path, required=True, help="file of the runs, .csv or .parquet")
    parser.add_argument("--curves", type=Path, help="file of the curves, .parquet")
    options = parser.parse_args(argv)
    with Store(options.output / STORE_NAME) as store:
        print(f"{export_runs(store, options.to)} runs in {options.to}")
        if options.curves is not None:
            print(f"{export_curves(store, options.curves)} curves in {options.curves}")
    return 0


SUFFIXES = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".log": "megatron-log",
    ".txt": "megatron-log",
}


def import_(argv: list[str], prog: str) -> int:
    """Add runs from a file or folder to a store, which is created when there is none; a rejected import leaves nothing."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument(
        "file", type=Path, help="file of runs (.csv, .parquet, .json, .jsonl, .log) or a folder of logs"
    )
    parser.add_argument("--mapping", type=Path, help="YAML that says what the columns of another program mean")
    parser.add_argument("--format", choices=FORMATS, help="what the file is (default: the mapping's, or by its name)")
    parser.add_argument("--curves", type=Path, help="curves, .parquet")
    parser.add_argument("--baseline", help="baseline of a new store (default: the file's, else adamw)")
    options = parser.parse_args(argv)
    mapping = None if options.mapping is None else read_mapping(options.mapping)
    kind = options.format or (mapping.format if mapping else None) or _kind(options.file)
    if mapping is None and kind in ("tensorboard", "megatron-log"):
        mapping = megatron_mapping()
    if mapping is None and kind not in ("csv", "parquet"):
        raise UserError(
            f"{options.file} is {kind}, whose names differ from file to file; say what they mean by --mapping"
        )
    notes: list[str] = []
    if mapping is None:
        rows = read_runs(options.file)
    else:
        rows, notes = read_foreign(options.file, kind, mapping)
    curves = read_curves(options.curves)
    new = not (options.output / STORE_NAME).exists()
    made = _make(options.output)
    try:
        with Store(options.output / STORE_NAME, create=True) as store:
            added = store.import_runs(rows, curves)
            if new:
                store.set_meta("baseline", options.baseline or store.meta("baseline", "adamw"))
    except BaseException:
        if new:
            _remove(options.output, made)
        raise
    diverged = sum(row["status"] == "diverged" for row in rows)
    for note in notes:
        print(f"note: {note}")
    print(f"{added} runs added to {options.output / STORE_NAME}, {diverged} of them diverged")
    return 0


def _kind(path: Path) -> str:
    if path.is_dir():
        return "tensorboard" if any(path.rglob("*tfevents*")) else "megatron-log"
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot tell the format of {path}; give --format {', '.join(FORMATS)}")
    return SUFFIXES[path.suffix]


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns the folders that were not there, the outermost first."""
    lacking = [parent for parent in [*reversed(folder.parents), folder] if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from None
    return lacking


def _remove(folder: Path, made: list[Path]) -> None:
    """Take away a store that this import began, and the folders that it made."""
    for file in folder.glob(f"{STORE_NAME}*"):
        file.unlink()
    for one in reversed(made):
        one.rmdir()
