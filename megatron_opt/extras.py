"""Packages that a plain installation may lack, and the sentence for each: one table for every command."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

from megatron_opt.errors import UserError, unusable

# module → what brings it
_BRINGS = {
    "datasets": "pip install 'megatron-opt[eval]'",
    "lm_eval": "pip install 'megatron-opt[eval]'",
    "safetensors": "pip install 'megatron-opt[data]'",
    "tiktoken": "pip install 'megatron-opt[data]'",
    "tokenizers": "pip install 'megatron-opt[data]'",
    "transformers": "pip install 'megatron-opt[data]'",
    "zstandard": "pip install 'megatron-opt[data]'",
    "wandb": "pip install 'megatron-opt[wandb]'",
    "transformer_engine": "pip install 'megatron-opt[gpu]'",
    "transformer_engine_torch": "pip install 'megatron-opt[gpu]'",
}
_OURS = ("megatron_opt", "__main__")


def require(name: str) -> ModuleType:
    """Import a package that may be absent; UserError with what brings it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        sentence = missing_package(error)
        if sentence is None:
            raise
        raise sentence from None


def missing(name: str) -> UserError | None:
    """The sentence for a package by its module's name; None where it is installed."""
    return missing_package(ModuleNotFoundError(name=name))


def missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The sentence for a package that is not installed; None where the missing module is one of ours (a defect)."""
    top = (error.name or "").split(".")[0]
    if not top or top in _OURS or _installed(top):
        return None
    remedy = _BRINGS.get(top, "pip install megatron-opt, in the environment that runs this, brings it")
    return UserError(f"the package {top} is not installed; {remedy}.")


def sentence_of(error: Exception, of_files: Callable[[OSError], UserError | None] = unusable) -> UserError | None:
    """What a command says of an error that its user can mend; None for a defect."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, OSError):
        return of_files(error)
    return error if isinstance(error, UserError) else None


def _installed(top: str) -> bool:
    try:
        return find_spec(top) is not None
    except (ImportError, ValueError):
        return False
