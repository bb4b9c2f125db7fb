"""A task's data from files of this machine in place of the hub, read so that no malformed line goes unnoticed.

A data set NAME of the hub, say allenai/ai2_arc with its part ARC-Easy, is looked for in DIR/allenai/ai2_arc/ARC-Easy as
SPLIT.jsonl, SPLIT.json or SPLIT*.parquet; its part may be missing from the path where it has one alone.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError

_KINDS = (".jsonl", ".json", ".parquet")
_KEPT = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def loader(folder: Path | None, original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of `datasets.load_dataset`: json files and local copies are read by us, all else by `original`."""

    def load(path: str, name: str | None = None, data_files: Any = None, split: str | None = None, **more: Any) -> Any:
        if path == "json" and data_files:
            return _of_files(_named(data_files, folder), split)
        copy = folder / path if folder is not None and not Path(path).is_absolute() else None
        if copy is not None and copy.is_dir():
            return _of_files(_splits(copy, name), split)
        try:
            return original(path=path, name=name, data_files=data_files, split=split, **more)
        except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
            where = f"put {'SPLIT.jsonl files' if name is None else f'{name}/SPLIT.jsonl files'} under DIR/{path}"
            raise UserError(
                f"the data set {path} cannot be fetched ({_short(error)}); {where}, and give --tasks-path DIR."
            ) from None

    return load


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _named(data_files: Any, folder: Path | None) -> dict[str, list[Path]]:
    """Files of a task's own `data_files`, by split; a relative path ends one within --tasks-path, or is from here."""
    table = data_files if isinstance(data_files, dict) else {"train": data_files}
    files: dict[str, list[Path]] = {}
    for split, names in table.items():
        for name in [names] if isinstance(names, str) else names:
            files.setdefault(split, []).append(_file(name, folder))
    return files


def _file(name: str, folder: Path | None) -> Path:
    paths = [] if folder is None or Path(name).is_absolute() else sorted(folder.rglob(name))
    if len(paths) > 1:
        raise UserError(
            f"{folder} has {paths[0]} and {paths[1]}, and a task asks for {name}; let it ask for more of the path."
        )
    return paths[0] if paths else Path(name)


def _splits(copy: Path, name: str | None) -> dict[str, list[Path]]:
    folders = [copy / name] if name else []
    folders += [copy / "data", copy]
    if name and not folders[0].is_dir() and any(entry.is_dir() and entry.name != "data" for entry in copy.iterdir()):
        raise UserError(f"{copy} has no folder {name}, of which the task takes its items; put its files there.")
    for folder in folders:
        files: dict[str, list[Path]] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else []:
            if file.suffix in _KINDS:
                files.setdefault(re.split(r"[-.]", file.name)[0], []).append(file)
        if files:
            return files
    raise UserError(f"{folders[0]} holds no SPLIT.jsonl, .json or .parquet file; put the data set's files there.")


def _of_files(files: dict[str, list[Path]], split: str | None) -> Any:
    import datasets

    whole = datasets.DatasetDict({one: _read(paths) for one, paths in files.items()})
    if split is None:
        return whole
    if split not in whole:
        raise UserError(f"there is no {split} among the local files ({', '.join(whole)}).")
    return whole[split]


def _read(paths: list[Path]) -> Any:
    import datasets

    if paths[0].suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            return datasets.Dataset(pyarrow.concat_tables([parquet.read_table(path) for path in paths]))
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{paths[0]} cannot be read ({_short(error)}); fetch it again.") from None
    rows = [row for path in paths for row in rows_of(path)]
    if not rows:
        raise UserError(f"{paths[0]} holds no item.")
    try:
        return datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueErrors and TypeErrors
        raise UserError(f"{paths[0]}: its items are not all of one form ({_short(error)}).") from None


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl, or of a .json that is one list; all with the same keys and kinds of values.

    Raises UserError, which names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    rows: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for where, read in _items(path, text):
        try:
            row = read() if callable(read) else read
        except ValueError as error:
            raise UserError(f"{path}, {where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, {where} is no JSON object.")
        rows.append(row)
        first = first or row
        _same(f"{path}, {where}", first, row)
    return rows


def _items(path: Path, text: str) -> Any:
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        return [(f"item {number}", item) for number, item in enumerate(items, 1)]
    lines = text.split("\n")
    return [(f"line {number}", lambda line=line: json.loads(line)) for number, line in enumerate(lines, 1) if line]


def _same(where: str, first: dict[str, Any], row: dict[str, Any]) -> None:
    if missing := first.keys() - row.keys():
        raise UserError(f"{where} has no {min(missing)}, which the first item has.")
    if extra := row.keys() - first.keys():
        raise UserError(f"{where} has {min(extra)}, which the first item has not.")
    for key, value in row.items():
        if value is None and first[key] is not None:
            raise UserError(f"{where}: {key} is null, in the first item it is {_KEPT[type(first[key])]}.")
        if first[key] is not None and _KEPT[type(value)] != _KEPT[type(first[key])]:
            raise UserError(
                f"{where}: {key} is {_KEPT[type(value)]}, in the first item it is {_KEPT[type(first[key])]}."
            )
        if isinstance(value, dict) and isinstance(first[key], dict):
            _same(f"{where}, {key}", first[key], value)
