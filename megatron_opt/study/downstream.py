"""A run's accuracy on tasks: how it is asked for at the end of a run, and read from its results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt import run_files
from megatron_opt.checkpointing import folders
from megatron_opt.errors import UserError
from megatron_opt.study.spec import Evaluation, Study

_LAYOUT = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size")
EMA, LOSS = "moving average", "validation_loss"
"""what averaged weights are called, and the loss among tasks"""
_ACCURACIES = ("acc", "exact_match")
"""metrics of which more is better, by their beginning"""


def arguments(
    evaluation: Evaluation | None, folder: Path, training: Sequence[str] = (), valid: str | None = None
) -> tuple[str, ...]:
    """Arguments of `megatron-opt eval` for the last checkpoint of the run in `folder`; none without an evaluation.

    `training`: the run's own, whose layout cuts the model here too. `valid`: validation data, over which averaged weights and
    raw ones get a loss.
    """
    if evaluation is None:
        return ()
    words = [str(folder / "checkpoints"), "--tasks", ",".join(evaluation.tasks)]
    words += ["--batch-size", str(evaluation.batch_size), "--output", str(folder / "results.json")]
    words += ["--items", str(folder / "items.jsonl")]
    for flag in ("tasks_path", "num_fewshot", "limit"):
        if (value := getattr(evaluation, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    for flag in _LAYOUT:
        if flag in training:
            words += [flag, training[training.index(flag) + 1]]
    words += ["--average", str(evaluation.average)] if evaluation.average else []
    words += ["--weights", "both"] if evaluation.ema else []
    if valid and (evaluation.average or evaluation.ema):
        words += ["--loss-on", valid]
    return tuple(words)


def rehearse(study: Study) -> None:
    """Raise UserError for tasks under `tasks_path` that the study's models could not answer; a hub may be out of reach here."""
    if (asked := study.evaluation) is None or not asked.tasks_path:
        return
    from megatron_opt.data.tokenizer import load_tokenizer
    from megatron_opt.evaluation.rehearsal import rehearse

    try:
        rehearse(
            asked.tasks, Path(asked.tasks_path), asked.num_fewshot, asked.limit, load_tokenizer(study.data.tokenizer),
            study.sequence_length,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"`eval:` of the study: {error}") from None


@dataclass(frozen=True)
class Items:
    """Whether each item of a task was answered right, in the task's order, and a digest of what the items are."""

    right: tuple[bool, ...]
    digest: str


def file_items(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The results with each item of `items.jsonl` as one bit, so that a store can test paired without the runs' folders."""
    try:
        lines = [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return results
    bits: dict[str, dict[str, tuple[str, str]]] = {}
    for line in lines:
        name = next((one for one in line["metrics"] if one.startswith(_ACCURACIES)), None)
        value = line["metrics"].get(name)
        if value in (0, 1):
            bits.setdefault(line["task"], {}).setdefault(str(line["item"]), (str(int(value)), line["doc_hash"]))
    if not bits:
        return results
    bits_of = {}
    for task, rows in bits.items():
        digest = hashlib.sha256(" ".join(name for _, name in rows.values()).encode()).hexdigest()
        bits_of[task] = {"right": "".join(bit for bit, _ in rows.values()), "digest": digest[:16]}
    return results | {"items": bits_of}


def items(results: dict[str, Any]) -> dict[str, Items]:
    """Task → its items, of a run's results in the store; empty where they were not kept."""
    kept = results.get("items") or {}
    return {task: Items(tuple(bit == "1" for bit in one["right"]), one["digest"]) for task, one in kept.items()}


def last(results: dict[str, Any]) -> dict[str, Any]:
    """Task → what `megatron-opt eval` wrote of the run's last checkpoint; empty where it was not evaluated."""
    written = (results.get("evaluation") or {}).get(folders.name_of(int(results.get("iterations") or 0)))
    return written if isinstance(written, dict) else {}


def averaged(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What averaged weights of the last checkpoint are called → their tasks; empty where none were evaluated."""
    last_name = folders.name_of(int(results.get("iterations") or 0))
    found = {}
    for name, tasks in (results.get("evaluation") or {}).items():
        if name == last_name + run_files.AVERAGED:
            found[EMA] = tasks
        elif name.startswith(f"{last_name} mean of"):
            found[name.removeprefix(f"{last_name} ")] = tasks
    return found


def is_complete(evaluation: Evaluation, results: dict[str, Any]) -> bool:
    """Nothing that a study asks of a run is missing from its results."""
    wanted = bool(evaluation.average) + evaluation.ema
    return bool(last(results)) and len(averaged(results)) >= wanted


@dataclass(frozen=True)
class Score:
    """A task's first accuracy, or else its first metric, as a mean over seeds."""

    metric: str
    value: float
    error: float | None
    """standard error over items; seeds share the items, so that more of them do not lessen it here"""

    @property
    def more_is_better(self) -> bool:
        return self.metric.startswith(_ACCURACIES)


def scores(several: list[dict[str, Any]], weights: str | None = None) -> dict[str, Score]:
    """Task → score, from the results of a configuration's runs; only tasks that all of them have.

    `weights`: a name of averaged ones, in place of the raw.
    """
    evaluated = [averaged(results).get(weights, {}) if weights else last(results) for results in several]
    scores_of = {}
    for task in evaluated[0] if evaluated else ():
        if not all(task in one for one in evaluated):
            continue
        metrics = evaluated[0][task]["metrics"]
        name = next((one for one in metrics if one.startswith(_ACCURACIES)), next(iter(metrics)))
        each = [one[task]["metrics"][name] for one in evaluated]
        errors = [one["stderr"] for one in each if one["stderr"] is not None]
        error = sum(errors) / len(errors) if len(errors) == len(each) else None
        scores_of[task] = Score(name, sum(one["value"] for one in each) / len(each), error)
    return scores_of
