"""Fields of the rules' configurations: a default, a line of help (the flag's), and the values that make sense."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import field as dataclass_field
from dataclasses import fields
from typing import Any

from megatron_opt.errors import UserError


class OptionError(UserError):
    """A value that a field does not take; whoever knows the optimizer's name says the flag's (`registry.build`)."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field} {why}")
        self.field, self.why = field, why


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    high: float | None = None,
    needs: tuple[str, Any] | None = None,
) -> Any:
    """A dataclass field with help; numbers are finite and ≥ low, > above, < below, ≤ high.

    `needs` is (field, value): without it the option has no effect.
    """
    limits = {"low": low, "above": above, "below": below, "high": high}
    return dataclass_field(default=default, metadata={"help": help, "needs": needs, **limits})


def decay(default: float, help: str, needs: tuple[str, Any] | None = None) -> Any:
    """The β of a moving average: in [0, 1 − 1e-6], beyond which fp32 has no room for 1 − β."""
    return option(default, help, low=0.0, high=1 - 1e-6, needs=needs)


def epsilon(default: float, help: str, needs: tuple[str, Any] | None = None) -> Any:
    """What keeps a divisor from zero: in [1e-30, 1], so that fp32 holds it and what it divides."""
    return option(default, help, low=1e-30, high=1.0, needs=needs)


def choice(default: str, choices: tuple[str, ...], help: str) -> Any:
    """A dataclass field that takes one of a few words."""
    return dataclass_field(default=default, metadata={"help": help, "choices": choices})


def number(value: Any) -> float | None:
    """A number or its text (YAML reads `3e-1` as text) as a number; None for what is none, booleans among it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _read(name: str, default: Any, value: Any) -> Any:
    """The value in its default's type; OptionError where it has no meaning there."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise OptionError(name, f"is {value!r}; it must be true or false.")
    elif isinstance(default, int | float):
        parsed = number(value)
        if parsed is None or not math.isfinite(parsed):
            raise OptionError(name, f"is {value!r}; it must be a finite number.")
        if isinstance(default, float):
            return float(parsed)
        if parsed != int(parsed):
            raise OptionError(name, f"is {value!r}; it must be a whole number.")
        return int(parsed)
    return value


def read(config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a configuration in the types of its fields; OptionError for those that have no such value."""
    defaults = {item.name: item.default for item in fields(config)}
    return {name: _read(name, defaults[name], value) for name, value in given.items()}


def limits(meta: Mapping[str, Any]) -> str:
    """The values that a numeric field takes, in words."""
    words = {"low": "at least", "above": "greater than", "below": "less than", "high": "at most"}
    return " and ".join(f"{words[key]} {meta[key]:.12g}" for key in words if meta.get(key) is not None)


def check(config: Any) -> None:
    """Refuse values outside a field's choices or limits, naming the field."""
    for item in fields(config):
        value, meta = getattr(config, item.name), item.metadata
        if choices := meta.get("choices"):
            if value not in choices:
                raise OptionError(item.name, f"is {value!r}; use one of {', '.join(choices)}.")
            continue
        value = _read(item.name, item.default, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, above, below, high = (meta.get(key) for key in ("low", "above", "below", "high"))
        if not (
            (low is None or value >= low)
            and (above is None or value > above)
            and (below is None or value < below)
            and (high is None or value <= high)
        ):
            raise OptionError(item.name, f"is {value}; it must be {limits(meta)}.")


def flag(name: str, field: str) -> str:
    """The command line's name of an optimizer's option."""
    return f"--{name}-{field}".replace("_", "-")


def check_given(name: str, config: Any, given: Iterable[str]) -> None:
    """Refuse options that were given although another one leaves them without effect."""
    metadata = {item.name: item.metadata for item in fields(config)}
    for key in given:
        other, value = metadata[key].get("needs") or ("", None)
        if other and getattr(config, other) != value:
            said = str(value).lower() if isinstance(value, bool) else value
            raise UserError(
                f"{flag(name, key)} has no effect without {flag(name, other)} {said}; give both or neither."
            )
