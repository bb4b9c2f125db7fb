"""Reads a YAML file of the study: a reader turns a mapping into checked values.

Every message starts with `FILE:LINE:`, so that a user can jump to the place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from megatron_opt import yaml_files
from megatron_opt.errors import UserError, nearest_or_all
from megatron_opt.yaml_files import LocatedDict


def load(path: str | os.PathLike) -> LocatedDict:
    """Read a YAML file whose top level is a mapping; raises UserError with file and line."""
    path = Path(path)
    try:
        content = yaml_files.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the study file {path}: {error}; check the path") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, LocatedDict):
        raise UserError(f"{path}:1: the file must be a mapping of keys, such as `models:`")
    return content


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

    def section(self, key: str) -> Reader:
        """`nested`, empty where the key is not given."""
        return self.nested(key) or Reader(LocatedDict(), self.path, f"`{key}:`")

    def pairs(self, key: str) -> dict[str, Any]:
        """A mapping whose keys are not known here; empty where it is not given."""
        return dict(self.section(key).mapping)

    def finish(self) -> None:
        for key in self.left:
            hint = nearest_or_all(key, self.known, others="known keys:")
            raise self.error(f"unknown key `{key}` in {self.where}; {hint}", key)


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(dict(value) if isinstance(value, dict) else value)
    return text if len(text) <= 40 else text[:37] + "…"
