"""The files a run leaves in its --output-dir, and their one reader: no torch, no Megatron.

config.json (what was run, written at start), metrics.jsonl and events.jsonl (as it trains), results.json (at its end).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic

CONFIG, RESULTS, METRICS, EVENTS = "config.json", "results.json", "metrics.jsonl", "events.jsonl"

AVERAGED = "_ema"  # ends the split of an evaluation of averaged weights

Row = dict[str, Any]


def lines(path: Path) -> list[Row]:
    """All whole JSON objects of a file of lines, in order; a torn line is left out, a missing file is empty."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    rows = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def events(folder: Path | str) -> list[Row]:
    """Events of a run, oldest first; a line that is no event (without a name or a time) is left out."""
    numbers = ("time", "iteration", "restart")
    return [
        row
        for row in lines(Path(folder) / EVENTS)
        if isinstance(row.get("event"), str) and "time" in row and all(_number(row.get(name, 0)) for name in numbers)
    ]


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))


def _key(row: Row) -> tuple[str, str, int]:
    kind = str(row["kind"])
    return kind, str(row.get("split", "valid")) if kind == "eval" else "", int(row["iteration"])


def metrics(path: Path | str) -> list[Row]:
    """Rows of a metrics.jsonl by iteration; of a step (or evaluation) that was done twice, the last."""
    kept: dict[tuple[str, str, int], Row] = {}
    for row in lines(Path(path)):
        try:
            key = _key(row)
        except (KeyError, TypeError, ValueError):
            continue
        if not all(_number(row.get(name)) for name in ("time", "tokens_per_s", "step_time")):
            continue
        kept.pop(key, None)
        kept[key] = row
    return sorted(kept.values(), key=lambda row: int(row["iteration"]))


def training(rows: Iterable[Row]) -> list[Row]:
    """The steps among the rows."""
    return [row for row in rows if row["kind"] == "train"]


def evaluations(rows: Iterable[Row], split: str = "valid") -> list[Row]:
    """The evaluations of a split among the rows."""
    return [row for row in rows if row["kind"] == "eval" and row.get("split", "valid") == split]


def forget_after(path: Path, iteration: int) -> list[Row]:
    """Leave in a metrics.jsonl what a run that goes on from `iteration` has behind it, each step once; returns that.

    Rows dropped are kept in metrics.superseded.jsonl beside it.
    """
    if not path.is_file():
        return []
    kept = [row for row in metrics(path) if int(row["iteration"]) <= iteration]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    before = path.read_text(errors="replace")
    if before != text:
        dropped = [line for line in before.splitlines() if line not in set(text.splitlines())]
        if dropped:
            with path.with_name("metrics.superseded.jsonl").open("a") as stream:
                stream.write("\n".join(dropped) + "\n")
        write_atomic(path, text)
    return kept


def results(folder: Path | str) -> Row | None:
    """results.json; None where it is absent or unreadable."""
    try:
        content = json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def record(source: Path | str) -> Row:
    """config.json of a run, running, killed or finished: its folder, its config.json or its results.json.

    Raises UserError where there is none.
    """
    source = Path(source)
    file = source
    if source.is_dir():
        file = next((source / name for name in (CONFIG, RESULTS) if (source / name).is_file()), source / CONFIG)
    elif source.name == RESULTS and source.with_name(CONFIG).is_file():
        file = source.with_name(CONFIG)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); give a run's folder or a YAML file of flags."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{file} has no `config`; it is not the {CONFIG} or {RESULTS} of a run.")
    return content


def flags(record: Row) -> dict[str, Any]:
    """All flags of a run's record, name with hyphens → value; an optimizer's options as `muon-momentum`."""
    named = {key.removeprefix("rule_").replace("_", "-"): value for key, value in record["config"].items()}
    if "world_size" in record:
        named["world-size"] = record["world_size"]
    return named
