"""What an evaluation found: for people one table, for programs the key `evaluation` of results.json, and a line an item."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.files import write_output
from megatron_opt.report.terminal import aligned

KEY = "evaluation"


def tidy(results: Any, limit: int | None) -> dict[str, Any]:
    """Task or group → its metrics with standard errors, items and examples, of the harness's results."""
    told: dict[str, Any] = {}
    groups = results.get("groups") or {}
    for name, numbers in {**results["results"], **groups}.items():
        metrics = {}
        for key, value in numbers.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = numbers.get(f"{metric}_stderr,{chosen}")
            error = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
            metrics[metric if chosen == "none" else f"{metric} ({chosen})"] = {"value": float(value), "stderr": error}
        if not metrics:
            continue
        told[name] = {
            "metrics": metrics,
            "items": numbers.get("sample_len") or results["n-samples"].get(name, {}).get("effective"),
            "num_fewshot": results["n-shot"].get(name),
            "limit": limit,
            "version": results["versions"].get(name),
        }
        if name in groups:
            told[name]["tasks"] = results["group_subtasks"].get(name, [])
    return told


def table(told: dict[str, Any]) -> str:
    """One aligned table."""
    rows = [("task", "shots", "items", "metric", "value", "± stderr")]
    for name, one in told.items():
        head = (name, _number(one["num_fewshot"]), _number(one["items"]))
        for metric, metric_value in one["metrics"].items():
            error = "–" if metric_value["stderr"] is None else f"{metric_value['stderr']:.4f}"
            rows.append((*head, metric, f"{metric_value['value']:.4f}", error))
            head = ("", "", "")
    return aligned(rows, left=(0, 3))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}"


def items(results: Any) -> Iterator[dict[str, Any]]:
    """A line for each item: what the model answered, which the task's metrics are made of."""
    for task, samples in results["samples"].items():
        for one in samples:
            yield {
                "task": task,
                "item": one["doc_id"],
                "doc_hash": one["doc_hash"],
                "target": one["target"],
                "answers": [answers[0] for answers in one["resps"]],
                **({} if one["filter"] == "none" else {"filter": one["filter"]}),
                "metrics": {name: one[name] for name in one["metrics"]},
            }


def read(path: Path) -> dict[str, Any]:
    """A results.json to add to; empty where there is none. Raises UserError for what is no such file."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"--output {path} cannot be read ({error.strerror}); name another file.") from None
    except ValueError as error:
        raise UserError(f"--output {path} is there and is not JSON ({error}); name another file.") from None
    if not isinstance(known, dict) or not isinstance(known.get(KEY, {}), dict):
        raise UserError(f"--output {path} is there and is no results.json; name another file.")
    return known


def write(path: Path, checkpoint: str, told: dict[str, Any]) -> None:
    """Add the tasks of a checkpoint (its folder's name) to results.json; all else in it stays, a task done again is replaced."""
    known = read(path)
    known.setdefault(KEY, {}).setdefault(checkpoint, {}).update(told)
    write_output(path, json.dumps(known, indent=1) + "\n")


def write_items(path: Path, results: Any) -> None:
    """One JSON line an item."""
    write_output(path, "".join(json.dumps(one, default=str) + "\n" for one in items(results)))
