"""`study run`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opt.report.terminal import make_console
from megatron_opt.study import samples
from megatron_opt.study.dataset import from_store
from megatron_opt.study.display import observe, print_summary
from megatron_opt.study.scheduler import Stopped, open_study
from megatron_opt.study.study_file import read_study


def main(argv: list[str], prog: str) -> int:
    """Run or resume a study; exit code 0 complete, 1 runs failed or the budget is spent, 130 stopped."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("study", type=Path, help="study file (YAML)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the store, the runs and the report")
    parser.add_argument("--max-hours", type=float, help="start no further run after this time; run again to go on")
    parser.add_argument("--retry-failed", action="store_true", help="try failed runs again")
    options = parser.parse_args(argv)
    study, console = read_study(options.study), make_console()
    if study.executor.command is None:  # the optimizers' own options take seconds to load
        from megatron_opt.study.commands.checking import check_study, note_small_weights

        check_study(study)
        if note := note_small_weights(study):
            console.print(f"note: {note}", soft_wrap=True, markup=False)
    with open_study(study, options.output) as scheduler:
        store = scheduler.store
        if options.retry_failed:
            store.retry_failed()
        try:
            with observe(console, store) as observer:
                complete = scheduler.run(observer, options.max_hours)
                observer.update(scheduler)
        except (Stopped, KeyboardInterrupt):
            console.print("Stopped; every run was saved. The same command goes on from here.")
            return 130
        # The report's libraries take a second to load, which a restarted scheduler need not wait for.
        from megatron_opt.study.analysis import analyse_if_possible
        from megatron_opt.study.report import write_report

        dataset = from_store(store)
        unsaid: list[str] = []
        if study.sample and complete:
            unsaid = samples.take(store, dataset, study.sample, options.output / "runs")
            dataset = from_store(store)
        cluster = None
        if dataset.cluster is not None:
            from megatron_opt.study.commands.pricing import cluster_times

            cluster = cluster_times(dataset.cluster, dataset, dataset.target[0])
        page = write_report(dataset, options.output / "report", analyse_if_possible(dataset, cluster=cluster))
        print_summary(console, dataset)
        if scheduler.waiting:
            console.print(
                f"{', '.join(map(str, scheduler.waiting))} wait for their predictions: `megatron-opt study predict "
                f"{options.output}`, then the same command goes on.",
                soft_wrap=True,
                markup=False,
            )
        failed = [record for record in dataset.records if record.status == "failed"]
        waiting = [record for record in dataset.records if record.status == "planned"]
    for line in unsaid:
        console.print(line, markup=False, soft_wrap=True)
    for record in failed[:5]:
        console.print(f"failed: run {record.id}, {record.optimizer} {record.regime}: {record.reason}", markup=False)
    if len(failed) > 5:
        console.print(f"… and {len(failed) - 5} more failed runs")
    if waiting:
        console.print(f"{len(waiting)} runs wait: the time or budget is spent; the same command goes on.")
    console.print(f"report: {page}", soft_wrap=True, markup=False)
    return 0 if complete else 1
