"""Transformer Engine's own Python on a machine without a GPU: its C++ module is answered for in plain torch.

The package `transformer-engine` brings layers, recipes and tensors in Python; all that computes lies in the C++ module
`transformer_engine_torch`, which needs CUDA. Here a module of that name holds the functions that the layers call, in torch
operations on the CPU. What differs from hardware: docs/transformer_engine.md.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_opt.errors import UserError

VERSION = "2.20.2"  # whose Python was read


def wanted(argv: Sequence[str]) -> bool:
    """Whether the flags ask for Transformer Engine's layers."""
    words = [word for flag in argv for word in flag.split("=", 1)]
    return any(pair == ("--transformer-impl", "transformer_engine") for pair in zip(words, words[1:]))


def installed() -> bool:
    """Whether the Python of Transformer Engine is there."""
    return (
        "transformer_engine" in sys.modules
        or importlib.machinery.PathFinder.find_spec("transformer_engine") is not None
    )


def hide() -> None:
    """Make `import transformer_engine` fail as if it were not installed: its library does not load without a GPU."""
    if not any(isinstance(finder, _Hidden) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hidden())


def install() -> None:
    """Answer for the C++ module and import Transformer Engine; once a process, before Megatron is imported."""
    if "transformer_engine_torch" in sys.modules:
        return
    if not installed():
        raise UserError(
            "--transformer-impl transformer_engine needs the package transformer-engine, on CPU its Python alone: "
            "pip install --no-deps --target te -r requirements-te.txt and PYTHONPATH=te "
            f"(transformer-engine {VERSION}); or train with --transformer-impl local."
        )
    from importlib.metadata import version

    if version("transformer-engine") != VERSION:
        raise UserError(
            f"transformer-engine is {version('transformer-engine')}, on CPU {VERSION} is emulated: "
            "pip install --no-deps --target te -r requirements-te.txt, then PYTHONPATH=te."
        )
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its library is not loaded
    from megatron_opt.platform.transformer_engine import casts, norms, products  # noqa: F401  they register themselves
    from megatron_opt.platform.transformer_engine.extension import MODULE

    sys.modules["transformer_engine_torch"] = MODULE
    sys.meta_path.insert(0, _WithoutLibrary())
    from megatron_opt.platform.transformer_engine import layers

    layers.install()


class _Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            raise ModuleNotFoundError(f"{name} is not used on this machine", name=name)


class _WithoutLibrary(importlib.abc.MetaPathFinder):
    """`transformer_engine.common` with a loader of its C++ module that finds ours already there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformer_engine.common":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.load_framework_extension = lambda framework: None

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
