"""The mapping file: which columns of a foreign file are optimizer, model, loss and so on, and rows of a store from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.study.imports.values import ImportedRow, final_loss, plain
from megatron_opt.study.yaml_lines import Reader, load

FORMATS = ("csv", "parquet", "wandb-history", "json", "tensorboard", "megatron-log")
FIELDS = ("optimizer", "model", "ratio", "parameters", "tokens", "loss", "seed", "run")
MEGATRON = {
    "optimizer": "args.optimizer",
    "seed": "args.seed",
    "loss": "loss",
    "tokens": "tokens",
    "parameters": "parameters",
    "model": "model",
    "run": "path",
}
MEGATRON_HYPER = {
    "lr": "args.lr",
    "weight_decay": "args.weight_decay",
    "beta1": "args.adam_beta1",
    "beta2": "args.adam_beta2",
    "clip_grad": "args.clip_grad",
    "batch_size": "args.global_batch_size",
}


@dataclass(frozen=True)
class Mapping:
    """What a mapping file says; ours → theirs."""

    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    hyper: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    """column of ours → {their value: ours}"""
    scale: dict[str, float] = field(default_factory=dict)
    """number of ours → factor, such as tokens: 1e9"""
    match: tuple[str, re.Pattern[str]] | None = None
    """column, and a pattern whose named groups become columns"""
    models: dict[str, int] = field(default_factory=dict)
    """model → non-embedding parameters"""
    per_parameter: float = 20.0
    """tokens a parameter at 1x"""
    diverged: tuple[str, tuple[str, ...]] | None = None
    skip: tuple[str, tuple[str, ...]] | None = None
    """column and the values that say so"""
    last_of: tuple[str, str] | None = None
    """columns that name the run and the step: of each run, the row of the last step counts"""
    records: str | None = None
    """key of the list of runs in a JSON file"""


def read_mapping(path: Path) -> Mapping:
    """Read a mapping file; raises UserError with the line of the mistake."""
    top = Reader(load(path), path, "the mapping file")

    def table(key: str) -> dict[str, Any]:
        content = top.take(key, None) or {}
        if not isinstance(content, dict):
            raise top.error(f"`{key}:` must be a mapping", key)
        return {str(k): v for k, v in content.items()}

    def chosen(key: str) -> tuple[str, tuple[str, ...]] | None:
        reader = top.nested(key)
        if reader is None:
            return None
        choice = reader.text("column", required=True), tuple(map(str, reader.items("values") or ()))
        reader.finish()
        return choice

    columns = {key: str(value) for key, value in table("columns").items()}
    for key in columns:
        if key not in FIELDS:
            raise top.error(
                f"`columns:` has no {key!r}; ours are {', '.join(FIELDS)} (others under `hyper:`)", "columns"
            )
    match, history = top.nested("match"), top.nested("last_of")
    pattern, last_of = None, None
    if match is not None:
        column, text = match.text("column", required=True), match.text("pattern", required=True)
        try:
            pattern = column, re.compile(text)
        except re.error as error:
            raise match.error(f"`pattern: {text}` is no regular expression: {error}", "pattern") from None
        match.finish()
    if history is not None:
        last_of = history.text("run", required=True), history.text("step", required=True)
        history.finish()
    values = table("values")
    mapping = Mapping(
        format=top.choice("format", FORMATS, "csv") if "format" in top.mapping else None,
        columns=columns,
        hyper={key: str(value) for key, value in table("hyper").items()},
        constants=table("constants"),
        values={key: {str(k): v for k, v in (value or {}).items()} for key, value in values.items()},
        scale={key: float(value) for key, value in table("scale").items()},
        match=pattern,
        models={key: int(float(value)) for key, value in table("models").items()},
        per_parameter=float(top.number("tokens_per_parameter", 20, above=0)),
        diverged=chosen("diverged"),
        skip=chosen("skip"),
        last_of=last_of,
        records=top.text("records"),
    )
    top.finish()
    return mapping


def megatron_mapping() -> Mapping:
    """What Megatron's own names mean, for its logs and TensorBoard folders."""
    return Mapping(columns=MEGATRON, hyper=MEGATRON_HYPER, values={"optimizer": {"adam": "adamw"}})


def rows_of(imported: list[ImportedRow], mapping: Mapping) -> tuple[list[dict[str, Any]], list[str]]:
    """Columns of `exchange.REQUIRED` and more for each run, and notes on what was left out or numbered."""
    rows, notes, skipped = [], [], 0
    if mapping.last_of is not None:
        imported = _last(imported, *mapping.last_of)
    for one in imported:
        if mapping.match is not None:
            _match(one, *mapping.match)
        if mapping.skip is not None and str(one.get(mapping.skip[0])) in mapping.skip[1]:
            skipped += 1
            continue
        rows.append(_row(one, mapping))
    if skipped:
        notes.append(f"{skipped} runs left out by `skip:`.")
    if not rows:
        raise UserError("the import holds no run; check the mapping's `skip:` and the file")
    if "seed" not in mapping.columns and "seed" not in mapping.constants and not _has_group(mapping, "seed"):
        repeated = _number_seeds(rows)
        if repeated:
            notes.append(
                f"No seed is given: {repeated} repetitions of a configuration are numbered in the order of the file, and do not "
                "pair with those of other optimizers."
            )
    return rows, notes


def _has_group(mapping: Mapping, name: str) -> bool:
    return mapping.match is not None and name in mapping.match[1].groupindex


def _match(one: ImportedRow, column: str, pattern: re.Pattern[str]) -> None:
    text = str(one.get(column) or "")
    match = pattern.search(text)
    if match is None:
        raise UserError(
            f"{one.where}, column {column!r}: {text!r} does not match `{pattern.pattern}`; correct the pattern"
        )
    one.columns |= {name: value for name, value in match.groupdict().items() if value is not None}


def _row(one: ImportedRow, mapping: Mapping) -> dict[str, Any]:
    def value(name: str) -> Any:
        column = mapping.columns.get(name)
        if column is None and _has_group(mapping, name):
            column = name
        raw = mapping.constants.get(name) if column is None else one.get(column)
        return mapping.values.get(name, {}).get(str(raw), raw)

    def number(name: str) -> float | None:
        raw = value(name)
        if raw is None:
            return None
        column = mapping.columns.get(name, name)
        return (ImportedRow(one.where, {column: raw}).number(column) or 0.0) * mapping.scale.get(name, 1.0)

    model, parameters, tokens, ratio = value("model"), number("parameters"), number("tokens"), number("ratio")
    parameters = parameters or mapping.models.get(str(model))
    if parameters and tokens is None and ratio:
        tokens = ratio * mapping.per_parameter * parameters
    if parameters and ratio is None and tokens:
        ratio = float(f"{tokens / parameters / mapping.per_parameter:.3g}")
    given = {
        "optimizer": value("optimizer"),
        "model": model,
        "parameters": parameters,
        "tokens": tokens,
        "ratio": ratio,
    }
    lacking = [name for name, item in given.items() if not item]
    if lacking:
        raise UserError(
            f"{one.where}: {', '.join(lacking)} cannot be told; name a column under `columns:`, a group of `match:`, or a "
            "value under `constants:` or `models:` of the mapping"
        )
    where = f"{one.where}, column {mapping.columns.get('loss', 'loss')!r}"
    loss = final_loss(number("loss"), where)
    if mapping.diverged is not None and str(one.get(mapping.diverged[0])) in mapping.diverged[1]:
        loss = None
    hyper = {key: plain(one.get(column)) for key, column in mapping.hyper.items()}
    seed = number("seed") or 0
    if seed != int(seed):
        raise UserError(
            f"{one.where}, column {mapping.columns.get('seed', 'seed')!r}: {seed:g} is no seed; correct the value"
        )
    run = value("run")
    return {
        **{key: str(item) if key in ("optimizer", "model") else item for key, item in given.items()},
        "loss": loss,
        "status": "diverged" if loss is None else "completed",
        "seed": int(seed),
        "hyper": {key: item for key, item in hyper.items() if item is not None},
        "config": {"source": one.where} | ({} if run is None else {"run": str(run)}),
    }


def _number_seeds(rows: list[dict[str, Any]]) -> int:
    """Give repetitions of a configuration seeds 0, 1, …; returns how many there are."""
    seen: dict[str, int] = {}
    for row in rows:
        key = repr([row["optimizer"], row["model"], row["ratio"], sorted(row["hyper"].items(), key=str)])
        row["seed"] = seen.get(key, 0)
        seen[key] = row["seed"] + 1
    return sum(count - 1 for count in seen.values())


def _last(imported: list[ImportedRow], run: str, step: str) -> list[ImportedRow]:
    """Of a history, one record a run: each column's value at the last step that has one."""
    merged: dict[str, ImportedRow] = {}
    for one in sorted(imported, key=lambda one: (str(one.get(run)), one.number(step) or 0.0)):
        known = merged.setdefault(str(one.get(run)), ImportedRow(one.where, dict(one.columns)))
        known.columns |= {key: value for key, value in one.columns.items() if value not in (None, "")}
        known.where = one.where
    return list(merged.values())
