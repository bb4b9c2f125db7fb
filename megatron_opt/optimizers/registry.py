"""Names of optimizers. A file of this folder registers its rule with a decorator; a name can be taken once."""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.optimizers.options import OptionError, check_given, flag, read

ENTRY_POINTS = "megatron_opt.optimizers"  # the group of entry points of rules in other packages
_OPTIMIZERS: dict[str, type] = {}


def register(cls: type) -> type:
    """Class decorator: makes the rule known under its `name`."""
    name = cls.name  # type: ignore[attr-defined]
    if name in _OPTIMIZERS:
        raise UserError(f"optimizer {name!r} is registered twice, by {_OPTIMIZERS[name]} and {cls}; rename one.")
    _OPTIMIZERS[name] = cls
    return cls


def optimizers() -> dict[str, type]:
    """All rules by name, importing their files, and those of other packages' entry points, once."""
    package = importlib.import_module("megatron_opt.optimizers")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"megatron_opt.optimizers.{module.name}")
    for entry in _entries():
        _load(entry)
    return dict(_OPTIMIZERS)


@functools.cache
def _entries() -> tuple[metadata.EntryPoint, ...]:
    """Looking for them reads every installed package's metadata: once a process."""
    return tuple(metadata.entry_points(group=ENTRY_POINTS))


@functools.cache
def _load(entry: metadata.EntryPoint) -> None:
    """A rule of another package: a class, which may register itself, or a module whose classes do."""
    try:
        loaded = entry.load()
    except Exception as error:
        raise UserError(
            f"the entry point {entry.name!r} = {entry.value!r} of {ENTRY_POINTS} cannot be loaded: {error}; "
            "mend or uninstall its package."
        ) from error
    if isinstance(loaded, type) and _OPTIMIZERS.get(getattr(loaded, "name", "")) is not loaded:
        register(loaded)


def known(name: str) -> Any:
    """The class of an optimizer; UserError for an unknown name."""
    classes = optimizers()
    if name not in classes:
        raise UserError(f"there is no optimizer {name!r}; there are {', '.join(sorted(classes))}.")
    return classes[name]


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an optimizer in their fields' types; unknown ones, and those that are no such values, are refused."""
    config = known(name).Config
    fields = set(config.__dataclass_fields__)
    if unknown := sorted(set(options) - fields):
        raise UserError(
            f"optimizer {name!r} has no option {unknown[0]!r}; it has {', '.join(sorted(fields)) or 'none'}."
        )
    try:
        return read(config, options)
    except OptionError as error:
        raise UserError(f"{flag(name, error.field)} {error.why}") from error


def build(name: str, options: Mapping[str, Any]) -> Any:
    """An optimizer from its name and options; unknown names and options, and those without effect, are refused."""
    cls, given = known(name), read_options(name, options)
    try:
        config = cls.Config(**given)
    except OptionError as error:
        raise UserError(f"{flag(name, error.field)} {error.why}") from error
    check_given(name, config, given)
    return cls(config)
