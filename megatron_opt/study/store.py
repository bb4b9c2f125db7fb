"""Every run of a study in one SQLite file.

The scheduler is the only regular writer; others may write at the same time (WAL, immediate transactions).
Training jobs never open the file, so it may lie on a local disk while runs lie on a shared one.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.study import curves
from megatron_opt.study.runs import Run
from megatron_opt.study.spec import Regime

VERSION = 1
STATES = ("planned", "running", "completed", "diverged", "failed")
FINISHED = ("completed", "diverged")
"""states that are results and never run again"""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE runs (
    id TEXT PRIMARY KEY, optimizer TEXT NOT NULL, model TEXT NOT NULL, ratio REAL NOT NULL, seed INTEGER NOT
    NULL,
    hyper TEXT NOT NULL, config TEXT NOT NULL, arguments TEXT NOT NULL, parameters INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('planned','running','completed','diverged','failed')),
    attempts INTEGER NOT NULL DEFAULT 0, interruptions INTEGER NOT NULL DEFAULT 0, job TEXT,
    created REAL NOT NULL, started REAL, finished REAL, loss REAL, results TEXT, reason TEXT
) WITHOUT ROWID;
CREATE INDEX runs_by_place ON runs (optimizer, model, ratio);
CREATE INDEX runs_by_status ON runs (status);
CREATE TABLE phases (
    phase TEXT NOT NULL, run TEXT NOT NULL REFERENCES runs (id), PRIMARY KEY (phase, run)
) WITHOUT ROWID;
CREATE TABLE curves (run TEXT PRIMARY KEY REFERENCES runs (id), parquet BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE events (time REAL NOT NULL, run TEXT NOT NULL, what TEXT NOT NULL);
"""

TEXT = ("id", "optimizer", "model", "hyper", "config", "arguments", "status", "results", "reason")
WHOLE = ("seed", "parameters", "tokens", "attempts", "interruptions")
REAL = ("ratio", "created", "started", "finished", "loss")
_COLUMNS = (*TEXT, *WHOLE, *REAL)
"""of a run that is imported, by type"""
SETTINGS = (
    *("name", "baseline", "tokens_per_parameter", "target", "looks", "margin", "cluster"),
    *("models", "to_register", "trace"),
)
"""what is known of a study as a whole and goes with its runs; registered predictions are files of their own"""


@dataclass(frozen=True)
class Record:
    """One row of the store."""

    id: str
    optimizer: str
    regime: Regime
    seed: int
    hyper: dict[str, Any]
    config: dict[str, Any]
    arguments: list[str]
    parameters: int
    tokens: int
    status: str
    attempts: int = 1
    interruptions: int = 0
    job: str | None = None
    started: float | None = None
    finished: float | None = None
    loss: float | None = None
    """final validation loss; None for a run that diverged or has not finished"""
    results: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    created: float | None = None

    @property
    def unique_tokens(self) -> int:
        """Tokens of one epoch."""
        return self.tokens // self.regime.epochs


class Store:
    """The runs of one study; use as a context manager."""

    def __init__(self, path: str | Path, *, create: bool = False):
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise UserError(f"no study store at {self.path}; start one with `megatron-opt study run`")
        self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        with self._errors():
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._open()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _open(self) -> None:
        with self.transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise UserError(
                    f"{self.path} was written by a newer version (store version {version}, this program reads "
                    f"up to {VERSION}); update megatron_opt, the file is untouched"
                )
            if version == 0:
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise UserError(f"{self.path} is a database of something else; choose another --output")
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Say in a sentence what SQLite says in a code."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "full" in text or "disk I/O" in text:
                raise UserError(
                    f"cannot write {self.path}: {text}; free some space and run the same command again, "
                    "finished runs are kept"
                ) from None
            if "not a database" in text or "malformed" in text:
                raise UserError(f"{self.path} is not a readable study store ({text}); restore it from a copy") from None
            if "locked" in text or "readonly" in text:
                raise UserError(f"cannot write {self.path}: {text}; close the other program or fix its mode") from None
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and one writer at a time."""
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # what is known of the study as a whole

    def meta(self, key: str, default: Any = None) -> Any:
        row = self._connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def settings(self) -> dict[str, Any]:
        """What fits and reports read beside the runs, as far as it is known; the baseline, else the first run's optimizer."""
        first = self._connection.execute(
            "SELECT optimizer FROM runs ORDER BY created, optimizer, model, ratio, id LIMIT 1"
        ).fetchone()
        known = {"baseline": first["optimizer"]} if first else {}
        return known | {key: value for key in SETTINGS if (value := self.meta(key)) is not None}

    def _adopt(self, db: sqlite3.Connection, settings: dict[str, Any]) -> None:
        """Keep what an imported file says of its study and this store does not know yet; raises UserError for another 1x."""
        here, there = self.meta("tokens_per_parameter", 20.0), settings.get("tokens_per_parameter")
        if there not in (None, here) and db.execute("SELECT count(*) FROM runs").fetchone()[0]:
            raise UserError(
                f"1x is {there:g} tokens a parameter in the file and {here:g} in {self.path}; import it into another folder"
            )
        for key in SETTINGS:
            if key in settings:
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (key, json.dumps(settings[key])))

    def registered(self) -> set[str]:
        """Regimes whose predictions were registered."""
        return {name for entry in self.meta("registered", []) for name in entry["regimes"]}

    # writing runs

    def plan(self, phase: str, runs: list[Run], parameters: dict[str, int]) -> None:
        """Add wanted runs; a run that is there already only gains the phase. `parameters`: model → N."""
        now = time.time()
        with self.transaction() as db:
            for run in runs:
                db.execute(
                    "INSERT OR IGNORE INTO runs (id, optimizer, model, ratio, seed, hyper, config, arguments,"
                    " parameters, tokens, status, created) VALUES (?,?,?,?,?,?,?,?,?,?,'planned',?)",
                    (
                        run.id,
                        run.optimizer,
                        run.regime.model,
                        run.regime.ratio,
                        run.seed,
                        json.dumps(run.hyper),
                        json.dumps(run.config),
                        json.dumps(run.arguments),
                        parameters[run.regime.model],
                        run.tokens,
                        now,
                    ),
                )
                db.execute("INSERT OR IGNORE INTO phases VALUES (?, ?)", (phase, run.id))

    def claim(self, run: str, job: str) -> bool:
        """Mark a planned run as running; False when another writer was first."""
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE runs SET status = 'running', attempts = attempts + 1, job = ?, started = ?"
                " WHERE id = ? AND status = 'planned'",
                (job, time.time(), run),
            ).rowcount
            if changed:
                db.execute("INSERT INTO events VALUES (?, ?, ?)", (time.time(), run, f"started as {job}"))
            return bool(changed)

    def set_job(self, run: str, job: str) -> None:
        """Remember what the executor calls the job of a run."""
        with self.transaction() as db:
            db.execute("UPDATE runs SET job = ? WHERE id = ?", (job, run))

    def finish(self, run: str, results: dict[str, Any], curve: bytes | None) -> bool:
        """Record a result, once: False when the run already has one."""
        status = "diverged" if results.get("diverged") else "completed"
        loss = None if status == "diverged" else results.get("final_valid_loss")
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE runs SET status = ?, finished = ?, loss = ?, results = ?, reason = NULL"
                " WHERE id = ? AND status NOT IN ('completed', 'diverged')",
                (status, time.time(), loss, json.dumps(results), run),
            ).rowcount
            if changed:
                if curve is not None:
                    db.execute("INSERT OR REPLACE INTO curves VALUES (?, ?)", (run, curve))
                db.execute("INSERT INTO events VALUES (?, ?, ?)", (time.time(), run, status))
            return bool(changed)

    def give_back(self, run: str, reason: str, *, failed: bool, interrupted: bool) -> None:
        """Return a running run to the queue (interrupted or retried), or mark it failed for good."""
        with self.transaction() as db:
            db.execute(
                "UPDATE runs SET status = ?, reason = ?, interruptions = interruptions + ?"
                " WHERE id = ? AND status = 'running'",
                ("failed" if failed else "planned", reason, int(interrupted), run),
            )
            db.execute("INSERT INTO events VALUES (?, ?, ?)", (time.time(), run, reason))

    def retry_failed(self) -> int:
        """Put failed runs back in the queue with a fresh count of attempts; returns how many."""
        with self.transaction() as db:
            return db.execute(
                "UPDATE runs SET status = 'planned', attempts = 0, interruptions = 0 WHERE status = 'failed'"
            ).rowcount

    def import_runs(self, rows: list[dict[str, Any]], curves: dict[str, bytes]) -> int:
        """Add runs with their results; raises UserError, and adds nothing, when one contradicts the store."""
        added = 0
        with self.transaction() as db:
            self._adopt(db, next((row["study"] for row in rows if row.get("study")), {}))
            for row in rows:
                known = db.execute("SELECT status, loss FROM runs WHERE id = ?", (row["id"],)).fetchone()
                if known is None:
                    marks = ",".join("?" * len(_COLUMNS))
                    values = [row[column] for column in _COLUMNS]
                    db.execute(f"INSERT INTO runs ({','.join(_COLUMNS)}) VALUES ({marks})", values)
                    db.execute("INSERT INTO events VALUES (?, ?, 'imported')", (time.time(), row["id"]))
                    added += 1
                elif known["status"] in FINISHED and tuple(known) != (row["status"], row["loss"]):
                    raise UserError(
                        f"run {row['id']} is {known['status']} with loss {known['loss']} in {self.path} and "
                        f"{row['status']} with {row['loss']} in the file; nothing was imported"
                    )
                for phase in row["phases"]:
                    db.execute("INSERT OR IGNORE INTO phases VALUES (?, ?)", (phase, row["id"]))
            for run, parquet in curves.items():
                db.execute("INSERT OR IGNORE INTO curves VALUES (?, ?)", (run, parquet))
            results = db.execute("SELECT results FROM runs WHERE results IS NOT NULL")
            digests = {(json.loads(row[0]).get("tokenizer") or {}).get("sha256") for row in results} - {None}
            if len(digests) > 1:
                raise UserError(
                    "the file's runs used another tokenizer than the store's; losses per token of different "
                    "tokenizers cannot be compared, and nothing was imported"
                )
        return added

    # reading

    def runs(self, phase: str | None = None, status: str | None = None) -> list[Record]:
        """Runs in a stable order, all or of one phase or status."""
        query, values = "SELECT runs.* FROM runs", []
        if phase is not None:
            query, values = query + " JOIN phases ON run = id AND phase = ?", [phase]
        if status is not None:
            query, values = query + " WHERE status = ?", [*values, status]
        query += " ORDER BY created, optimizer, model, ratio, id"
        with self._errors():
            return [_record(row) for row in self._connection.execute(query, values)]

    def run(self, run: str) -> Record:
        """One run by the start of its id; raises UserError when there is none, or more than one."""
        rows = self._connection.execute("SELECT * FROM runs WHERE id LIKE ?", (run + "%",)).fetchall()
        if len(rows) != 1:
            raise UserError(
                f"{self.path} has {len(rows) or 'no'} runs {run!r}; `megatron-opt study status --runs` lists them"
            )
        return _record(rows[0])

    def rows(self) -> list[dict[str, Any]]:
        """Every run with the store's own column names, JSON columns as text."""
        return [dict(row) for row in self._connection.execute("SELECT * FROM runs ORDER BY created, id")]

    def curve_bytes(self, run: str) -> bytes | None:
        """The curve of a run as Parquet."""
        row = self._connection.execute("SELECT parquet FROM curves WHERE run = ?", (run,)).fetchone()
        return None if row is None else row[0]

    def states(self, ids: list[str]) -> dict[str, tuple[str, float | None]]:
        """id → (status, loss) of those of `ids` that the store knows."""
        states = {}
        for start in range(0, len(ids), 500):
            part = ids[start : start + 500]
            marks = ",".join("?" * len(part))
            for row in self._connection.execute(f"SELECT id, status, loss FROM runs WHERE id IN ({marks})", part):
                states[row[0]] = (row[1], row[2])
        return states

    def phases(self) -> dict[str, list[str]]:
        """phase → ids of its runs."""
        phases: dict[str, list[str]] = {}
        for phase, run in self._connection.execute("SELECT phase, run FROM phases ORDER BY phase, run"):
            phases.setdefault(phase, []).append(run)
        return phases

    def curve(self, run: str) -> curves.Curve | None:
        parquet = self.curve_bytes(run)
        return None if parquet is None else curves.from_parquet(parquet)

    def events(self, run: str | None = None) -> list[tuple[float, str, str]]:
        query = "SELECT time, run, what FROM events" + (" WHERE run = ?" if run else "") + " ORDER BY rowid"
        return [tuple(row) for row in self._connection.execute(query, (run,) if run else ())]


def _record(row: sqlite3.Row) -> Record:
    config = json.loads(row["config"])
    return Record(
        id=row["id"],
        optimizer=row["optimizer"],
        regime=Regime(row["model"], row["ratio"], int(config.get("epochs", 1))),
        seed=row["seed"],
        hyper=json.loads(row["hyper"]),
        config=config,
        arguments=json.loads(row["arguments"]),
        parameters=row["parameters"],
        tokens=row["tokens"],
        status=row["status"],
        attempts=row["attempts"],
        interruptions=row["interruptions"],
        job=row["job"],
        started=row["started"],
        finished=row["finished"],
        loss=row["loss"],
        results=json.loads(row["results"] or "{}"),
        reason=row["reason"],
        created=row["created"],
    )
