"""Runs a study to its end: asks the phases what they want, feeds the executor, files the results."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.extras import missing
from megatron_opt.files import sha256
from megatron_opt.study import curves, downstream
from megatron_opt.study.executors import Executor, Job, Outcome, make_executor
from megatron_opt.study.executors.base import last_words, read_results, saved_since, was_interrupted
from megatron_opt.study.phases import Planner
from megatron_opt.study.runs import Run
from megatron_opt.study.spec import Evaluation, Regime, Study
from megatron_opt.study.store import FINISHED, Store

STORE_NAME = "study.sqlite"
_BY_SIGNAL = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGHUP)}


class Stopped(Exception):
    """The scheduler was asked to stop by a signal."""


class Scheduler:
    """One study in one output folder."""

    def __init__(self, study: Study, output: Path, store: Store, executor: Executor | None = None):
        self.study, self.output, self.store = study, output, store
        self.executor = executor or make_executor(study.executor, output)
        self.running: dict[str, Job] = {}
        self.queue: list[Run] = []
        self.complete = False
        self.waiting: tuple[Regime, ...] = ()
        """regimes whose predictions have to be registered before their runs"""
        self._trace: list[dict[str, Any]] = []
        self.spent_hours = 0.0

    def run(self, observer: Any = None, max_hours: float | None = None, poll_seconds: float = 0.2) -> bool:
        """Work until every phase is complete; True then, False when runs failed or the budget is spent."""
        started, limit = time.monotonic(), self.study.max_hours
        with _signals():
            try:
                self._adopt()
                self._refresh()
                while self.running or self.queue:
                    late = max_hours is not None and time.monotonic() - started > 3600 * max_hours
                    if not late and not (limit is not None and self.spent_hours >= limit):
                        self._fill()
                    elif not self.running:
                        break
                    changed = [self._file(outcome) for outcome in self.executor.poll()]
                    if changed:
                        self._refresh()
                    if observer is not None:
                        observer(self)
                    if not changed:
                        time.sleep(poll_seconds)
            except BaseException:
                self._stop()
                raise
        return self.complete

    def _refresh(self) -> None:
        """Ask the phases again and rebuild the queue, longest runs first."""
        states = {record.id: record for record in self.store.runs()}
        hours = [r.results.get("wall_time_s", 0.0) for r in states.values() if r.status in FINISHED]
        self.spent_hours = sum(hours) * self.study.executor.ranks / 3600

        def lookup(run: Run) -> float | None:
            record = states.get(run.id)
            if record is None or record.status not in FINISHED:
                return None
            return math.inf if record.loss is None else record.loss

        parameters = {name: model.non_embedding_parameters for name, model in self.study.models.items()}
        wanted: dict[str, Run] = {}
        trace: list[dict[str, Any]] = []
        self.waiting = ()
        for phase, progress in Planner(self.study, lookup).phases():
            if phase.registered and not set(map(str, phase.regimes)) <= self.store.registered():
                self.waiting, self.complete = phase.regimes, False
                break
            self.store.plan(phase.kind, progress.wanted, parameters)
            wanted |= {run.id: run for run in progress.wanted}
            trace += progress.trace
            self.complete = progress.complete
        if trace != self._trace:
            self._trace = trace
            self.store.set_meta("trace", trace)
        now = self.store.states(list(wanted))
        self.queue = [run for run in wanted.values() if now[run.id][0] == "planned"]
        self.queue.sort(key=lambda run: -run.tokens * parameters[run.regime.model])

    def _job(self, run: str, arguments: list[str]) -> Job:
        folder = (self.output / "runs" / run).resolve()
        valid = next(iter(self.study.data.valid), None)
        evaluation = downstream.arguments(self._evaluation(run), folder, arguments, valid)
        return Job(run, folder, arguments, evaluation, trained=bool(evaluation) and _trained(read_results(folder)))

    def _evaluation(self, run: str) -> Evaluation | None:
        """What a run is evaluated on; None where it is not."""
        wanted = self.study.evaluation
        if wanted is None or not wanted.models or self.store.run(run).regime.model in wanted.models:
            return wanted
        return None

    def _fill(self) -> None:
        while self.queue and len(self.running) < self.executor.slots:
            run = self.queue.pop(0)
            job = self._job(run.id, run.arguments)
            # A result that was written but not yet filed when the last scheduler died is not trained again.
            if self._file_result(run.id):
                self._refresh()
                continue
            if not self.store.claim(run.id, "starting"):
                continue
            self.running[run.id] = job
            label = self.executor.submit(job)
            self.store.set_job(run.id, label)

    def _adopt(self) -> None:
        """Take over what an earlier scheduler left as running: wait for it, file it, or queue it again."""
        for record in self.store.runs(status="running"):
            job = self._job(record.id, record.arguments)
            if self.executor.adopt(job, record.job):
                self.running[record.id] = job
            elif not self._file_result(record.id):
                self.store.give_back(record.id, "its scheduler ended", failed=False, interrupted=True)

    def _file(self, outcome: Outcome) -> str:
        """Record how a job ended."""
        job = self.running.pop(outcome.run)
        if self._file_result(outcome.run):
            return outcome.run
        record = self.store.run(outcome.run)
        code = outcome.code
        by_signal = code is None or code < 0 or code in _BY_SIGNAL
        since = record.started or 0.0
        # A launcher reports the signal that ended its ranks as a plain failure; what was saved tells them apart.
        went_on = by_signal or was_interrupted(job.folder, since) or (code != 2 and saved_since(job.folder, since))
        interrupted = went_on and not outcome.timed_out
        if outcome.timed_out:
            reason = f"stopped after {self.study.executor.timeout_minutes:g} minutes"
        elif interrupted:
            reason = "interrupted" if code is None else f"interrupted, exit code {code}"
        elif code == 0:
            reason = "ended without a final validation loss in results.json"
        else:
            reason = f"exit code {code}: {last_words(job.folder)}"
        settings = self.study.executor
        failures = record.attempts - record.interruptions
        failed = code == 2 or (
            record.interruptions >= settings.preemptions if interrupted else failures > settings.retries
        )
        self.store.give_back(outcome.run, reason, failed=failed, interrupted=interrupted)
        return outcome.run

    def _file_result(self, run: str) -> bool:
        folder = self.output / "runs" / run
        results = read_results(folder)
        if results is None or not _trained(results):
            return False
        if (evaluation := self._evaluation(run)) is not None:
            if not results.get("diverged") and not downstream.is_complete(evaluation, results):
                return False
            results = downstream.file_items(results, folder)
        self.store.finish(run, results, curves.to_parquet(curves.read_metrics(folder / "metrics.jsonl")))
        return True

    def _stop(self) -> None:
        """End the jobs so that they save, and return them to the queue."""
        left = self.executor.stop()
        for run in list(self.running):
            if run not in left and not self._file_result(run):
                self.store.give_back(run, "stopped with the study", failed=False, interrupted=True)
            del self.running[run]


def _trained(results: dict[str, Any] | None) -> bool:
    return results is not None and bool(results.get("diverged") or _finite(results.get("final_valid_loss")))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the loop in good order."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def open_study(study: Study, output: Path) -> Iterator[Scheduler]:
    """Lock the output folder, check that it belongs to this study, and open its store."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / "scheduler.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}; choose another --output") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the study in {output}; wait for it or stop it") from None
        with Store(output / STORE_NAME, create=True) as store:
            _check_identity(study, store)
            downstream.rehearse(study)  # opens the tokenizer, which is there by now
            yield Scheduler(study, output, store)
    finally:
        os.close(lock)


def _check_evaluation(study: Study) -> None:
    if study.evaluation is None:
        return
    if lacking := missing("lm_eval"):
        raise UserError(f"`eval:` of the study: {lacking}")
    folder = study.evaluation.tasks_path
    if folder and not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; fix `eval: tasks_path:`")


def _check_identity(study: Study, store: Store) -> None:
    _check_evaluation(study)
    name, tokenizer = store.meta("name"), store.meta("tokenizer")
    if name not in (None, study.name):
        raise UserError(f"{store.path} belongs to the study {name!r}, not {study.name!r}; choose another --output")
    for prefix in study.data.path + study.data.train + study.data.valid:
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise UserError(f"no data file {prefix}{suffix}; make it with `megatron-opt data`, or fix `data:`")
    try:
        digest = sha256(Path(study.data.tokenizer))
    except OSError:
        raise UserError(f"no tokenizer at {study.data.tokenizer}; fix `data: tokenizer:`") from None
    if tokenizer not in (None, digest):
        raise UserError(
            f"the tokenizer {study.data.tokenizer} is not the one the runs in {store.path} used; "
            "losses per token of "
            "different tokenizers cannot be compared, so choose another --output"
        )
    store.set_meta("name", study.name)
    store.set_meta("tokenizer", digest)
    store.set_meta("baseline", study.baseline)
    store.set_meta("looks", study.looks if any(phase.kind == "seeds" for phase in study.phases) else 1)
    store.set_meta("margin", study.adopt)
    store.set_meta("tokens_per_parameter", study.tokens_per_parameter)
    store.set_meta("target", study.target)
    store.set_meta("cluster", study.cluster)
    store.set_meta("models", {name: model.non_embedding_parameters for name, model in study.models.items()})
    asked = {one for phase in study.phases for one in (*phase.regimes, phase.proxy) if one is not None}
    store.set_meta("regimes", {str(one): study.models[one.model].non_embedding_parameters for one in asked})
    store.set_meta("to_register", [str(r) for phase in study.phases if phase.registered for r in phase.regimes])
    store.set_meta("study_file", study.path.read_text(encoding="utf-8"))
