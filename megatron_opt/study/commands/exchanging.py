"""`study export` and `study import`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opt.study.exchange import export_curves, export_runs, import_runs
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


def import_(argv: list[str], prog: str) -> int:
    """Add runs from a file to a store, which is created when there is none."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("file", type=Path, help="runs, .csv or .parquet")
    parser.add_argument("--curves", type=Path, help="curves, .parquet")
    parser.add_argument("--baseline", help="baseline of a new store (default: adamw)")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    new = not (options.output / STORE_NAME).exists()
    with Store(options.output / STORE_NAME, create=True) as store:
        added = import_runs(store, options.file, options.curves)
        if new:
            store.set_meta("baseline", options.baseline or "adamw")
    print(f"{added} runs added to {options.output / STORE_NAME}")
    return 0
