"""`study export` and `study import`."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opt.study.exchange import export_curves, export_runs, read_runs
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


@contextmanager
def clean_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and take it away again with all that came into it, if what follows fails and it was not there."""
    new = next((part for part in reversed([folder, *folder.parents]) if not part.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before:
            path.unlink()
        if new is not None:
            shutil.rmtree(new)
        raise


def import_(argv: list[str], prog: str) -> int:
    """Add runs from a file to a store, which is created when there is none."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("file", type=Path, help="runs, .csv or .parquet")
    parser.add_argument("--curves", type=Path, help="curves, .parquet")
    parser.add_argument("--baseline", help="baseline of a new store (default: adamw)")
    options = parser.parse_args(argv)
    new = not (options.output / STORE_NAME).exists()
    rows, found = read_runs(options.file, options.curves)
    with clean_folder(options.output), Store(options.output / STORE_NAME, create=True) as store:
        added = store.import_runs(rows, found)
        if new:
            store.set_meta("baseline", options.baseline or "adamw")
    print(f"{added} runs added to {options.output / STORE_NAME}")
    return 0
