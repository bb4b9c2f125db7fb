"""YAML that remembers its lines, and a reader that turns a mapping into checked values.

Every message starts with `FILE:LINE:`, so that a user can jump to the place.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_opt.errors import UserError, nearest_or_all


class LocatedDict(dict):
    """A mapping with `lines`: key → line of the key, and `line` of its own start."""

    lines: dict[str, int]
    line: int


class LocatedList(list):
    """A list with the line of each item in `lines`, and `line` of its own start."""

    lines: list[int]
    line: int


class _Loader(yaml.SafeLoader):
    pass


# YAML 1.1 reads 1e-4 as text; people who write learning rates mean a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(path: str | os.PathLike) -> LocatedDict:
    """Read a YAML file whose top level is a mapping; raises UserError with file and line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the study file {path}: {error}; check the path") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:1: the file must be a mapping of keys, such as `models:`")
        return _construct(node, loader, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    finally:
        loader.dispose()


def _construct(node: yaml.Node, loader: _Loader, path: Path) -> Any:
    if isinstance(node, yaml.MappingNode):
        mapping = LocatedDict()
        mapping.lines, mapping.line = {}, node.start_mark.line + 1
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            if key in mapping:
                line = key_node.start_mark.line + 1
                raise UserError(f"{path}:{line}: {key!r} is given twice; first on line {mapping.lines[key]}")
            mapping.lines[key] = key_node.start_mark.line + 1
            mapping[key] = _construct(value_node, loader, path)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        items = LocatedList(_construct(item, loader, path) for item in node.value)
        items.lines = [item.start_mark.line + 1 for item in node.value]
        items.line = node.start_mark.line + 1
        return items
    return loader.construct_object(node)


class Reader:
    """Takes known keys out of one mapping; `finish` refuses what is left."""

    def __init__(self, mapping: Any, path: Path, where: str, line: int = 1):
        self.path, self.where, self.line = path, where, line
        if not isinstance(mapping, LocatedDict):
            raise self.error(f"{where} must be a mapping of keys to values, not {_show(mapping)}")
        self.mapping = mapping
        self.left = dict(mapping)
        self.known: list[str] = []

    def line_of(self, key: str) -> int:
        return self.mapping.lines.get(key, self.line)

    def error(self, message: str, key: str | None = None) -> UserError:
        line = self.line_of(key) if key is not None else self.line
        return UserError(f"{self.path}:{line}: {message}")

    def take(self, key: str, default: Any = None, *, required: bool = False) -> Any:
        self.known.append(key)
        if key not in self.left:
            if required:
                raise self.error(f"{self.where} lacks `{key}:`; add it")
            return default
        return self.left.pop(key)

    def text(self, key: str, default: str | None = None, **options: Any) -> Any:
        value = self.take(key, default, **options)
        if value is not None and not isinstance(value, str):
            raise self.error(f"`{key}:` must be text, not {_show(value)}", key)
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in choices:
            raise self.error(f"`{key}: {value}` is not one of {', '.join(choices)}", key)
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        above: float | None = None,
        least: float | None = None,
        whole: bool = False,
        **options: Any,
    ) -> Any:
        value = self.take(key, default, **options)
        if value is None:
            return None
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "a whole number" if whole else "a number"
            raise self.error(f"`{key}:` must be {kind}, not {_show(value)}", key)
        if above is not None and not value > above:
            raise self.error(f"`{key}: {value}` must be greater than {above}", key)
        if least is not None and not value >= least:
            raise self.error(f"`{key}: {value}` must be at least {least}", key)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.error(f"`{key}:` must be true or false, not {_show(value)}", key)
        return value

    def items(self, key: str, default: Any = None, **options: Any) -> Any:
        """A non-empty list; a single value counts as a list of one."""
        value = self.take(key, default, **options)
        if value is None:
            return None
        if isinstance(value, dict):
            raise self.error(f"`{key}:` must be a list, not a mapping", key)
        if not isinstance(value, list):
            return [value]
        if not value:
            raise self.error(f"`{key}:` is an empty list; name at least one", key)
        return value

    def numbers(self, key: str, default: Any = None, *, above: float | None = None, **options: Any) -> Any:
        values = self.items(key, default, **options)
        for value in values or []:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise self.error(f"`{key}:` must list numbers, not {_show(value)}", key)
            if above is not None and not value > above:
                raise self.error(f"`{key}:` has {value}; every value must be greater than {above}", key)
        return values

    def nested(self, key: str, where: str | None = None, **options: Any) -> Reader | None:
        value = self.take(key, None, **options)
        if value is None:
            return None
        return Reader(value, self.path, where or f"`{key}:`", self.line_of(key))

    def finish(self) -> None:
        for key in self.left:
            hint = nearest_or_all(key, self.known, others="known keys:")
            raise self.error(f"unknown key `{key}` in {self.where}; {hint}", key)


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(dict(value) if isinstance(value, dict) else value)
    return text if len(text) <= 40 else text[:37] + "…"
