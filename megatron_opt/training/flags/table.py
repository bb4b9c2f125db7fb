"""What each flag is to this job, looked up in the tables of this folder, and the check of a command line by them."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.training.flags.refused import (
    BY_OPTIMIZER,
    NEEDS_GPU,
    NEEDS_TE,
    OF_MEGATRONS_OPTIMIZERS,
    REFUSED,
    WITHOUT_MEANING,
)
from megatron_opt.training.flags.supported import FREE, SUPPORTED

Entry = tuple[str, str | None, str]
"""pattern of names, the one value that it is about (None: all), reason"""


def entries(table: dict[str, str]) -> list[Entry]:
    """The lines of a table of reasons, one for each name."""
    lines = []
    for reason, words in table.items():
        for word in words.split():
            name, sign, value = word.partition("=")
            lines.append((name, value if sign else None, reason))
    return lines


_TABLES: dict[str, list[Entry]] = {
    "refused": entries(REFUSED),
    "needs a GPU": entries(NEEDS_GPU),
    "needs Transformer Engine": entries(NEEDS_TE),
    "of Megatron's optimizers": entries(OF_MEGATRONS_OPTIMIZERS),
    "by optimizer": [
        *((name, None, why) for name, (_, why) in BY_OPTIMIZER.items()),
        *((name, None, why) for name, why in WITHOUT_MEANING.items()),
    ],
    "supported": entries({"": SUPPORTED}),
    "free": entries({"": FREE}),
}


def names_of(action: argparse.Action) -> list[str]:
    """A flag's spellings, without hyphens in front."""
    return [word.removeprefix("--") for word in action.option_strings if word.startswith("--")]


def _matching(names: Sequence[str], kind: str) -> Iterator[Entry]:
    for entry in _TABLES[kind]:
        plain = not set("*?[").intersection(
            entry[0]
        )  # compiling hundreds of patterns costs a start a tenth of a second
        if entry[0] in names if plain else any(fnmatchcase(name, entry[0]) for name in names):
            yield entry


def kinds_of(action: argparse.Action) -> set[str]:
    """The kinds that the tables give a flag for all of its values; empty where it is in none."""
    return {kind for kind in _TABLES for _, value, _ in _matching(names_of(action), kind) if value is None}


def patterns() -> dict[str, list[str]]:
    """Names and patterns of every table, by kind."""
    return {kind: [name for name, _, _ in table] for kind, table in _TABLES.items()}


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [getattr(item, "name", None) or str(item) for item in values]


def asked(action: argparse.Action, value: Any, given: Iterable[str]) -> str | None:
    """The spelling by which a flag was given another value than its default, or None."""
    spelled = [name for name in names_of(action) if name in given]
    return spelled[0] if spelled and (value != action.default or value is None) else None


def reasons(action: argparse.Action, value: Any, kind: str) -> Iterator[str]:
    """Why the tables of `kind` refuse this value of a flag."""
    for _, only, reason in _matching(names_of(action), kind):
        if only is None or only in _words(value):
            yield reason


def check_flags(
    args: Any, actions: Iterable[argparse.Action], given: set[str], *, cpu: bool, engine: bool, ours: bool
) -> None:
    """Refuse flags that would have no effect here.

    `cpu`: there is no CUDA device; `engine`: Transformer Engine is installed; `ours`: the optimizer is this project's.
    """
    for action in actions:
        value = getattr(args, action.dest, None)
        name = asked(action, value, given)
        if name is None:
            continue
        said = f"--{name}" + ("" if action.nargs == 0 else f" {' '.join(_words(value))}")
        for reason in reasons(action, value, "refused"):
            raise UserError(f"{said} is refused: {reason}.")
        if ours:
            for reason in reasons(action, value, "of Megatron's optimizers"):
                raise UserError(f"{said} does not work with --optimizer {args.optimizer}: {reason}; leave it out.")
        if cpu:
            for reason in reasons(action, value, "needs a GPU"):
                raise UserError(f"{said} needs a GPU and has no effect on CPU: {reason}; leave it out.")
        for reason in reasons(action, value, "needs Transformer Engine"):
            if not engine:
                raise UserError(
                    f"{said} needs Transformer Engine, which is not installed, and would have no effect: {reason}; "
                    "leave it out."
                )
            if getattr(args, "transformer_impl", None) != "transformer_engine":
                raise UserError(f"{said} has no effect on local layers; give --transformer-impl transformer_engine.")


def unsupported(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(flag, why) of what this project's optimizers do not do; `values`: flag with hyphens → value."""
    for flag, (fine, why) in BY_OPTIMIZER.items():
        value = values.get(flag)
        shards = flag.endswith("num-weight-shards")  # Megatron fills in the tensor-parallel size, which is no sharding
        size = values.get("expert-tensor-parallel-size" if flag.startswith("expert") else "tensor-model-parallel-size")
        if value not in (None, False, *fine) and not (shards and value == size):
            yield flag, why
