"""Values of imported runs, checked; every refusal names file, line and column."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_opt.errors import UserError


@dataclass
class ImportedRow:
    """One run as a file gives it: columns by name, and where it stands."""

    where: str
    """file and line"""
    columns: dict[str, Any]

    def get(self, column: str) -> Any:
        """The value of a column; None where it is empty; raises UserError where there is no such column."""
        if column not in self.columns:
            known = ", ".join(list(self.columns)[:40])
            raise UserError(f"{self.where}: no column {column!r}; it has {known}. Correct the mapping")
        value = self.columns[column]
        return None if value is None or (isinstance(value, str) and not value.strip()) else value

    def number(self, column: str) -> float | None:
        """The value as a number, NaN and ∞ included."""
        value = self.get(column)
        if value is None:
            return None
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value.replace(",", "") if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise UserError(
                f"{self.where}, column {column!r}: {value!r} is not a number; correct the value or the mapping"
            ) from None


def final_loss(value: float | None, where: str) -> float | None:
    """A final loss in nats; None (diverged) for NaN, ∞ and nothing; raises UserError for zero and below."""
    if value is None or not math.isfinite(value):
        return None
    if value <= 0:
        raise UserError(
            f"{where}: a final loss of {value:g} is impossible, a cross-entropy is above 0; correct the value"
        )
    return value


def plain(value: Any) -> Any:
    """Text as the number, boolean or word that it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(text) if text.lstrip("+-").isdigit() else number
