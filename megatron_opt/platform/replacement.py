"""A function of Megatron's replaced by ours, and the rule that keeps the two the same: a replacement declares the fields of
`TransformerConfig` that it honours; every other field that Megatron's code reads must stand at its default.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_opt.errors import UserError

# Flags that are not named like the field they set.
_FLAGS = {
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "window_size": "--window-size",
    "context_parallel_size": "--context-parallel-size",
}


@dataclass(frozen=True)
class Replacement:
    """`function` in place of `owner.name`; `owner` is a module or "module:Class", whose `constructor`, if named, gets a config."""

    owner: str
    name: str
    function: Callable[..., Any]
    honours: frozenset[str] | None = frozenset()
    """fields of TransformerConfig that it reads, or that leave the result as it is; None: it ends in Megatron's own function"""
    constructor: str | None = None

    def target(self) -> Any:
        """The module or class whose attribute is replaced."""
        module, _, cls = self.owner.partition(":")
        owner = importlib.import_module(module)
        return getattr(owner, cls) if cls else owner

    def install(self) -> None:
        """Put the function there, once; a class is from then on refused for configurations it would not honour."""
        owner = self.target()
        if self in _ORIGINALS:
            return
        names = dict.fromkeys([self.name, self.constructor or self.name])
        _ORIGINALS[self] = tuple(getattr(owner, name) for name in names)
        setattr(owner, self.name, self.function)
        if self.constructor:
            setattr(owner, self.constructor, _checked(self, getattr(owner, self.constructor)))

    def original(self) -> Callable[..., Any]:
        """Megatron's own function; only after `install`."""
        return _ORIGINALS[self][0]

    def read(self) -> frozenset[str]:
        """Fields of the configuration that Megatron's function, or the constructor beside it, reads."""
        return frozenset().union(*map(fields_read, _ORIGINALS[self]))

    def unread(self) -> frozenset[str]:
        """Those of them that the replacement does not honour."""
        return frozenset() if self.honours is None else self.read() - self.honours

    def check(self, config: Any) -> None:
        """Raise UserError where a field that only Megatron's own code reads is away from its default."""
        for name, default in _unread_defaults(self, type(config)):  # type: ignore[arg-type]
            value = getattr(config, name)
            if value != default:
                flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
                raise UserError(
                    f"{flag} ({name} = {value}) has no effect on the layers of --transformer-impl local as they are computed "
                    f"here ({self.target().__qualname__}); leave it out, or train with Transformer Engine's layers on a GPU."
                )


_ORIGINALS: dict[Replacement, tuple[Callable[..., Any], ...]] = {}


@functools.cache
def _unread_defaults(replacement: Replacement, config: Any) -> list[tuple[str, Any]]:
    fields = {field.name: field for field in dataclasses.fields(config)}
    unread = []
    for name in sorted(replacement.unread()):
        field = fields[name]
        factory = field.default_factory
        unread.append((name, field.default if factory is dataclasses.MISSING else factory()))
    return unread


def _checked(replacement: Replacement, construct: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(construct)
    def checked(self: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        replacement.check(config)
        return construct(self, config, *args, **kwargs)

    return checked


def fields_read(function: Callable[..., Any]) -> frozenset[str]:
    """Names X of every `config.X`, `self.config.X` and `getattr(config, "X", …)` in the function's source."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            of, name = node.args[:2]
            if _is_config(of) and isinstance(name, ast.Constant):
                names.add(str(name.value))
    return frozenset(names)


def _is_config(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "config" and isinstance(node.value, ast.Name)
    return isinstance(node, ast.Name) and node.id == "config"
