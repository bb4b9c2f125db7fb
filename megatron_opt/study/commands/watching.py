"""`study status`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.live import Live

from megatron_opt.report.terminal import make_console, print_table
from megatron_opt.study.display import STATES, counts, live_view
from megatron_opt.study.scheduler import STORE_NAME
from megatron_opt.study.store import FINISHED, Store


def main(argv: list[str], prog: str) -> int:
    """Show counts by optimizer and state; `--live` until the study ends, `--runs` every run."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("output", type=Path, help="folder of the study")
    parser.add_argument("--live", action="store_true", help="keep showing, until nothing runs or waits")
    parser.add_argument("--runs", action="store_true", help="list every run")
    options = parser.parse_args(argv)
    console = make_console()
    with Store(options.output / STORE_NAME) as store:
        if options.live:
            with Live(console=console, refresh_per_second=2) as live:
                while True:
                    records = store.runs()
                    hours = sum(r.results.get("wall_time_s") or 0.0 for r in records) / 3600
                    live.update(live_view(records, options.output / "runs", hours))
                    if all(record.status in (*FINISHED, "failed") for record in records):
                        return 0
                    time.sleep(1.0)
        records = store.runs()
        print_table(console, ["optimizer", *STATES, "best loss"], counts(records), store.meta("name", "study"))
        if options.runs:
            for r in records:
                loss = "–" if r.loss is None else f"{r.loss:.4f}"
                values = " ".join(f"{key}={value}" for key, value in r.hyper.items())
                why = f"  ({r.reason})" if r.reason else ""
                console.print(
                    f"{r.id}  {r.status:9}  {loss:>7}  {r.optimizer} {r.regime} seed {r.seed}  {values}{why}",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
    return 0
