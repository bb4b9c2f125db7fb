"""`megatron-opt optimizers [NAME]`: the rules that `--optimizer` knows; one rule's flags with defaults and limits."""

import argparse
import dataclasses
import inspect
import textwrap
from typing import Any

from megatron_opt.errors import UserError, did_you_mean
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.groups import default_group_configs

WIDTH = 100


def listing() -> str:
    """One line a rule: name and the first sentence of its documentation."""
    optimizer_classes = registry.optimizers()
    width = max(map(len, optimizer_classes))
    lines = [
        f"{name:<{width}}  {_first_line(optimizer_class)}"
        for name, optimizer_class in sorted(optimizer_classes.items())
    ]
    own = [f"{'adam, sgd':<{width}}  Megatron's own, as a baseline"]
    return "\n".join([*lines, *own, "", "One rule's flags: megatron-opt optimizers NAME"])


def _first_line(optimizer_class: type) -> str:
    return (inspect.getdoc(optimizer_class) or "").split("\n")[0]


def _limits(metadata: Any) -> str:
    if choices := metadata.get("choices"):
        return f"one of {', '.join(choices)}"
    signs = (("low", "≥"), ("above", ">"), ("below", "<"))
    return ", ".join(f"{sign} {metadata[key]:g}" for key, sign in signs if metadata.get(key) is not None)


def describe(name: str) -> str:
    """A rule's documentation, its flags with defaults, and who trains the parameters that it leaves."""
    optimizer_classes = registry.optimizers()
    if name not in optimizer_classes:
        known = sorted(optimizer_classes)
        raise UserError(f"there is no optimizer {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")
    optimizer_class = optimizer_classes[name]
    lines = [f"--optimizer {name}", "", inspect.getdoc(optimizer_class) or "", "", "flags:"]
    for field in dataclasses.fields(optimizer_class.Config):  # type: ignore[attr-defined]
        flag = f"--{name}-{field.name}".replace("_", "-")
        limits = _limits(field.metadata)
        lines.append(f"  {flag}  (default {field.default}{f'; {limits}' if limits else ''})")
        lines += textwrap.wrap(
            field.metadata.get("help", ""), WIDTH, initial_indent="      ", subsequent_indent="      "
        )
    groups = default_group_configs(name, {}, None)
    if len(groups) > 1:
        lines += ["", "parameter groups, first match wins (--optimizer-groups FILE changes them):"]
        lines += [f"  {group.match}  →  {group.optimizer}" for group in groups]
    return "\n".join(lines)


def main(argv: list[str], prog: str = "megatron-opt optimizers") -> int:
    """Print the list, or one rule."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="a rule, as --optimizer takes it")
    name = parser.parse_args(argv).name
    print(describe(name.replace("-", "_")) if name else listing())
    return 0
