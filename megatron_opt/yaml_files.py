"""YAML of users that remembers its lines; a key that is given twice is an error, where YAML's readers take the last."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import ConstructorError


class LocatedDict(dict):
    """A mapping whose keys are text, with `lines`: key → line of the key, and `line` of its own start."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}
        self.line = 1


class LocatedList(list):
    """A list with the line of each item in `lines`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Iterator[LocatedDict]:
    found = LocatedDict()
    found.line = node.start_mark.line + 1
    yield found  # before its values: they may refer to it
    for key_node, _ in node.value:
        if key_node.tag != "tag:yaml.org,2002:merge":
            key = _key(loader, key_node)
            if key in found.lines:
                first = f"{key!r} is given twice; first on line {found.lines[key]}"
                raise ConstructorError(None, None, first, key_node.start_mark)
            found.lines[key] = key_node.start_mark.line + 1
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = _key(loader, key_node)
        found.lines.setdefault(key, key_node.start_mark.line + 1)
        found[key] = loader.construct_object(value_node)  # type: ignore[no-untyped-call]


def _key(loader: _Loader, node: yaml.Node) -> str:
    return str(loader.construct_object(node, deep=True))  # type: ignore[no-untyped-call]


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> Iterator[LocatedList]:
    found = LocatedList()
    yield found
    found.lines = [item.start_mark.line + 1 for item in node.value]
    found += [loader.construct_object(item) for item in node.value]  # type: ignore[no-untyped-call]


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)
# YAML 1.1 reads 1e-4 as text; people who write learning rates mean a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(text: str) -> Any:
    """The content of a YAML text, mappings and lists with their lines; raises yaml.YAMLError."""
    return yaml.load(text, _Loader)
