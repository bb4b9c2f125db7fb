"""Megatron's assertions and exceptions as sentences: the flags in the failed condition, their values, what it wants.

Megatron checks flags by some three hundred `assert` and `raise` statements in `validate_args` and in `__post_init__` of
its configurations, often without a message. The condition is read from the source by `ast`.
"""

import argparse
import ast
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.extras import missing_package

# names of Megatron's configurations that differ from the flag's
_FIELDS = {
    "num_moe_experts": "num_experts",
    "gated_linear_unit": "swiglu",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "virtual_pipeline_model_parallel_size": "num_virtual_stages_per_pipeline_rank",
    "activation_func": "swiglu",
    "bias_activation_fusion": "bias_swiglu_fusion",
    "params_dtype": "bf16",
    "fp8_param": "fp8_param_gather",
    "fp4_param": "fp4_param_gather",
    "cpu_offloading": "cpu_offloading_num_layers",
    "transformer_pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "gtp_weight_remat_size": "tensor_parallel_num_weight_shards",
    "expert_gtp_weight_remat_size": "expert_tensor_parallel_num_weight_shards",
    "use_dist_ckpt": "ckpt_format",
    "pipeline_dtype": "bf16",
    "batch_p2p_comm": "overlap_p2p_comm",
}
_CHECKED = (AssertionError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError,
            ZeroDivisionError, RuntimeError, OSError, ImportError, NameError)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One `assert` or `raise` of Megatron's: where it stands, the names of `args.` and `self.` in it, its condition."""

    line: int
    names: tuple[str, ...]
    condition: str
    asserts: bool


def _attributes(node: ast.AST) -> list[str]:
    """Names taken from `args`, `self` or `config` in a piece of source, in the order of reading, each once."""
    names = []
    for item in ast.walk(node):
        if (
            isinstance(item, ast.Attribute)
            and isinstance(item.value, ast.Name)
            and item.value.id in ("args", "self", "config")
        ):
            names.append((item.lineno, item.col_offset, item.attr))
        elif (
            isinstance(item, ast.Call)
            and isinstance(item.func, ast.Name)
            and item.func.id in ("getattr", "_check_arg_is_not_none")
        ):
            names += [
                (item.lineno, item.col_offset, str(arg.value))
                for arg in item.args[1:2]
                if isinstance(arg, ast.Constant)
            ]
    return list(dict.fromkeys(name for _, _, name in sorted(names)))


@functools.cache
def checks_of(file: str) -> tuple[Check, ...]:
    """Every assert and raise of a source file, with the conditions of the `if`s around a raise."""
    tree = ast.parse(Path(file).read_text())
    checks: list[Check] = []
    local: dict[str, list[str]] = {}

    def read(node: ast.AST) -> list[str]:
        """Attributes in a piece of source, then those that its local names were set from."""
        words = [item.id for item in ast.walk(node) if isinstance(item, ast.Name)]
        return [*_attributes(node), *(name for word in words for name in local.get(word, ()))]

    def walk(node: ast.AST, around: tuple[ast.AST, ...]) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            around = ()
            local.clear()
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            local[node.targets[0].id] = _attributes(node.value)
        if isinstance(node, ast.Assert):
            names = [*read(node), *(name for test in reversed(around) for name in read(test))]
            checks.append(Check(node.lineno, tuple(dict.fromkeys(names)), ast.unparse(node.test), True))
        elif isinstance(node, ast.Raise):
            tests = around[-2:]
            names = [*(name for test in reversed(tests) for name in read(test)), *read(node)]
            checks.append(Check(node.lineno, tuple(dict.fromkeys(names)), " and ".join(map(ast.unparse, tests)), False))
        inner = (*around, node.test) if isinstance(node, ast.If) else around
        for child in ast.iter_child_nodes(node):
            walk(child, inner)

    walk(tree, ())
    return tuple(checks)


def _statement(file: str, line: int) -> Check | None:
    """The check that starts at or before a line, or what the expression of that line reads."""
    exact = [check for check in checks_of(file) if check.line == line]
    if exact:
        return exact[0]
    tree = ast.parse(Path(file).read_text())
    around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= (n.end_lineno or n.lineno)]
    node = max(around, key=lambda n: (n.lineno, -(n.end_lineno or 0)), default=None)
    if node is None:
        return None
    for check in checks_of(file):
        if node.lineno <= check.line <= (node.end_lineno or 0) and isinstance(node, ast.Assert | ast.Raise):
            return check
    return Check(line, tuple(_attributes(node)), "", False)


@dataclass(frozen=True)
class Flags:
    """dest → flag of a parser, and the flags that set theirs to false."""

    names: Mapping[str, str]
    negated: frozenset[str] = frozenset()

    @staticmethod
    def of(actions: Sequence[argparse.Action]) -> "Flags":
        """From a parser's actions."""
        names = {action.dest: action.option_strings[-1] for action in actions if action.option_strings}
        negated = (a.option_strings[-1] for a in actions if isinstance(a, argparse._StoreFalseAction))
        return Flags(names, frozenset(negated))

    def of_name(self, name: str) -> str | None:
        """The flag behind an attribute of `args` or of a configuration."""
        return self.names.get(name) or self.names.get(_FIELDS.get(name, ""))


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames inside Megatron that the error passed, innermost first."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if "/megatron/" in frame.f_code.co_filename and "/megatron_opt/" not in frame.f_code.co_filename
    ]
    return reversed(frames)


def _values(frame: FrameType, names: Sequence[str], flags: Flags) -> list[tuple[str, Any]]:
    """(flag, value) of the named attributes, as the frame saw them."""
    holders = [frame.f_locals[word] for word in ("args", "self", "config") if word in frame.f_locals]
    values = []
    for name in names:
        flag = flags.of_name(name)
        for holder in holders:
            if flag and hasattr(holder, name):
                value = getattr(holder, name)
                values.append((flag, not value if flag in flags.negated and isinstance(value, bool) else value))
                break
    return list(dict(values).items())


def _said(flag: str, value: Any) -> str:
    if value is None:
        return f"{flag} is not given"
    if isinstance(value, bool):
        return f"{flag} is {'on' if value else 'off'}"
    return f"{flag} is {getattr(value, 'name', None) or value}"


def _condition(check: Check, flags: Flags) -> str:
    text = check.condition
    for name in sorted(check.names, key=len, reverse=True):
        if flag := flags.of_name(name):
            for holder in ("args", "self", "config"):
                text = text.replace(f"{holder}.{name}", f"not {flag}" if flag in flags.negated else flag)
    return text.replace("not not ", "").replace("is not None", "given").replace("is None", "not given")


def sentence(error: BaseException, flags: Flags) -> str:
    """What Megatron refuses, the flags in it with their values, and which to change."""
    text = " ".join(str(error).split()).rstrip(".")
    for frame, line in _frames(error):
        check = _statement(frame.f_code.co_filename, line)
        values = _values(frame, check.names, flags) if check else []
        if check is None or not values:
            continue
        missing = [flag for flag, value in values if value is None]
        if not isinstance(error, AssertionError) and not check.condition and missing:
            return f"{missing[0]} is not given, and Megatron needs it here; give it."
        wanted = text or f"it wants {_condition(check, flags)}"
        state = ", ".join(_said(flag, value) for flag, value in values[:4])
        one = values[0][0] if len(values) == 1 else "one of them"
        return f"{wanted} ({state}); change {one}."
    named = [flag for flag in flags.names.values() if flag in text]
    return f"{text or type(error).__name__}" + ("." if named else f" ({_where(error)}).")


def _where(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"


def told(what: str, flags: Flags, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call Megatron; what it refuses becomes a UserError that names flags. `what` begins the sentence."""
    try:
        return function(*args, **kwargs)
    except _CHECKED as error:
        missing = missing_package(error) if isinstance(error, ModuleNotFoundError) else None
        raise UserError(f"{what}: {missing or sentence(error, flags)}") from error


# what building a model raises for its flags; a RuntimeError there may be the network's, which a restart can mend
_BUILDING = (AssertionError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError)


def building(function: Callable[..., Any], flags: Flags) -> Callable[..., Any]:
    """Megatron's builder of models, what its layers refuse told as by `told`."""

    @functools.wraps(function)
    def build(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except _BUILDING as error:
            raise UserError(f"Megatron cannot build this model: {sentence(error, flags)}") from error

    return build
