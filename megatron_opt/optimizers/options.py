"""Fields of the rules' configurations: a default, a line of help (the flag's), and the values that make sense."""

from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any

from megatron_opt.errors import UserError


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    needs: tuple[str, Any] | None = None,
) -> Any:
    """A dataclass field with help; numbers must be ≥ low, > above, < below; `needs` (field, value): else without effect."""
    return field(default=default, metadata={"help": help, "low": low, "above": above, "below": below, "needs": needs})


def choice(default: str, choices: tuple[str, ...], help: str) -> Any:
    """A dataclass field that takes one of a few words."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check(config: Any) -> None:
    """Refuse values outside a field's choices or limits, naming the field."""
    for item in fields(config):
        value, meta = getattr(config, item.name), item.metadata
        if choices := meta.get("choices"):
            if value not in choices:
                raise UserError(f"{item.name} is {value!r}; use one of {', '.join(choices)}.")
            continue
        for key, sign, holds in (
            ("low", "at least", lambda v, limit: v >= limit),
            ("above", "greater than", lambda v, limit: v > limit),
            ("below", "less than", lambda v, limit: v < limit),
        ):
            limit = meta.get(key)
            if limit is not None and not holds(value, limit):
                raise UserError(f"{item.name} is {value}; it must be {sign} {limit}.")


def check_given(name: str, config: Any, given: Iterable[str]) -> None:
    """Refuse options that were given although another one leaves them without effect."""
    metadata = {item.name: item.metadata for item in fields(config)}
    for option_name in given:
        other, value = metadata[option_name].get("needs") or ("", None)
        if other and getattr(config, other) != value:
            raise UserError(f"{name}'s {option_name} has no effect without {other}={value}; give both or neither.")
