"""Megatron-LM's logs and TensorBoard folders: arguments, the last validation loss, how far the run came."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.layout.flags import structural
from megatron_opt.layout.spec import ModelSpec
from megatron_opt.study.imports.values import ImportedRow, plain

VALIDATION = re.compile(r"validation(?:-\S+)? loss at iteration (\d+)(?: on validation set)? \| lm loss value: (\S+)")
ITERATION = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
ARGUMENT = re.compile(r"^\s*([A-Za-z_]\w*) \.{2,} (.*)$")
TAG = "lm loss validation"
"""Megatron's scalar of the validation loss"""


def read_logs(path: Path) -> tuple[list[ImportedRow], list[str]]:
    """One run a log file (or each .log and .txt file of a folder); runs that did not reach their end are left out, and named."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".log", ".txt", ".out")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .log, .txt or .out file; name another folder")
    rows, notes = [], []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; check the file") from None
        args: dict[str, Any] = {}
        loss, line, at, done, total = None, 0, 0, 0, 0
        for number, text in enumerate(lines, start=1):
            if match := ARGUMENT.match(re.sub(r"^\[?rank\d*\]?:?|^\d+: ?", "", text)):
                args.setdefault(match[1], plain(match[2].strip()))
            elif match := VALIDATION.search(text):
                at, loss, line = int(match[1]), match[2], number
            elif match := ITERATION.search(text):
                done, total = int(match[1]), int(match[2])
        if not args or loss is None:
            what = "arguments" if not args else "validation loss"
            raise UserError(
                f"{file} has no {what} as Megatron-LM prints them; name a log of rank 0 and of the last rank"
            )
        total = total or int(args.get("train_iters") or 0)
        if max(at, done) < total:
            notes.append(f"{file} left out: it ends at iteration {max(at, done)} of {total}.")
            continue
        rows.append(_row(f"{file}, line {line}", file, args, loss))
    return rows, notes


def read_tensorboard(path: Path, tag: str = TAG) -> tuple[list[ImportedRow], list[str]]:
    """One run a folder that holds event files: the last value of every scalar by its tag, and the arguments Megatron writes."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise UserError("TensorBoard folders need the package tensorboard; install it") from None
    folders = sorted({file.parent for file in path.rglob("*tfevents*")})
    if not folders:
        raise UserError(f"{path} holds no TensorBoard event file (*tfevents*); name another folder")
    rows, notes = [], []
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        columns: dict[str, Any] = {}
        for name in events.Tags()["scalars"]:
            last = events.Scalars(name)[-1]
            columns[name], columns[f"{name}.step"] = last.value, last.step
        args = {}
        for name in events.Tags()["tensors"]:
            text = make_ndarray(events.Tensors(name)[-1].tensor_proto).reshape(-1)
            if len(text) and isinstance(text[0], bytes):
                args[name.removesuffix("/text_summary")] = plain(text[0].decode("utf-8", "replace"))
        total, at = args.get("train_iters"), columns.get(f"{tag}.step")
        if isinstance(total, int) and at is not None and at < total:
            notes.append(f"{folder} left out: it ends at iteration {at} of {total}.")
            continue
        one = _row(str(folder), folder, args, columns.get(tag))
        one.columns |= columns
        rows.append(one)
    return rows, notes


def _row(where: str, path: Path, args: dict[str, Any], loss: Any) -> ImportedRow:
    """Columns `args.NAME`, and what follows from them: tokens, parameters, a name for the model."""
    columns: dict[str, Any] = {f"args.{key}": value for key, value in args.items()}
    columns |= {"path": str(path), "loss": loss, "tokens": None, "parameters": None, "model": None}
    if all(isinstance(args.get(key), int) for key in ("train_iters", "global_batch_size", "seq_length")):
        columns["tokens"] = args["train_iters"] * args["global_batch_size"] * args["seq_length"]
    if all(isinstance(args.get(key), int) for key in ("num_layers", "hidden_size", "num_attention_heads")):
        flags = {key.replace("_", "-"): value for key, value in args.items() if value not in ("None", None)}
        try:
            columns["parameters"] = ModelSpec.of(structural(flags)).hidden_parameters
        except UserError as error:
            raise UserError(f"{where}: {error} Or give `models:` and a column of the model in a mapping") from None
        columns["model"] = f"{args['num_layers']}x{args['hidden_size']}"
    return ImportedRow(where, columns)
