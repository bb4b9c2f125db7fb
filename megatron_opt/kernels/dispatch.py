"""Operations with a native kernel and a torch reference; torch's dispatcher picks by device, the user can
force either.

`MEGATRON_OPT_KERNELS=reference` never loads the extension, `native` refuses to run without it; unset, the
extension is used where it is there and current, and a line on stderr says when it is not.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_opt.errors import UserError
from megatron_opt.kernels.source_hash import source_hash

NAMESPACE = "megatron_opt"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_SOURCES = Path(__file__).resolve().parents[2] / "csrc"
_BUILD = "`pip install --no-build-isolation -e .` builds it"


def mode() -> str:
    """The value of MEGATRON_OPT_KERNELS: `auto` (unset), `reference` or `native`."""
    value = os.environ.get("MEGATRON_OPT_KERNELS", "auto")
    if value not in ("auto", "reference", "native"):
        raise UserError(f"MEGATRON_OPT_KERNELS is {value!r}; set it to reference or native, or unset it.")
    return value


def _check_isa() -> None:
    value = os.environ.get("MEGATRON_OPT_ISA", "avx512")
    if value not in ("portable", "avx2", "avx512"):
        raise UserError(f"MEGATRON_OPT_ISA is {value!r}; set it to portable, avx2 or avx512, or unset it.")


def _defect(module: ModuleType) -> str | None:
    """Why this build of the extension must not be used, or None."""
    if module.torch_version != torch.__version__:
        return f"was built for torch {module.torch_version}, this is {torch.__version__}"
    if _SOURCES.is_dir() and module.source_hash != source_hash(_SOURCES):
        return "is older than csrc"
    return None


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """(extension, "") or (None, what is wrong); registers the native kernels, once a process."""
    _check_isa()
    try:
        module = importlib.import_module("megatron_opt._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, "is not built" if missing else f"cannot be loaded ({error})"
    if defect := _defect(module):
        return None, defect
    module.register_operators()
    return module, ""


@functools.cache
def _say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"megatron_opt: {message}", file=sys.stderr)


def native_available(device: torch.device | str = "cpu") -> bool:
    """Whether operations on this device run natively; refuses where `native` is forced and cannot be had."""
    if mode() == "reference":
        return False
    module, defect = _load()
    kind = torch.device(device).type
    if module is not None and (kind == "cpu" or (kind == "cuda" and module.cuda)):
        return True
    reason = f"the native kernels' extension {defect or f'has no {kind} kernels'}"
    if mode() == "native":
        raise UserError(f"MEGATRON_OPT_KERNELS=native, but {reason}; {_BUILD}.")
    _say_once(f"{reason}: the slower torch reference is used; {_BUILD}.")
    return False


class Operation:
    """One operation: `reference` is plain torch; calling it runs the native kernel where there is one."""

    def __init__(self, name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.reference = reference
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        self._operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, device: torch.device, *args: Any) -> Any:
        if native_available(device):
            return self._operator(*args)
        return self.reference(*args)
