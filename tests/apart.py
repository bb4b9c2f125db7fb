"""Packages that `make setup` keeps in folders of their own, so that no other test imports them."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(sys.prefix) / "transformers")


def transformers() -> Any:
    """Hugging Face's transformers, or the test is skipped."""
    found = _import("transformers")
    seen = sys.modules.get("megatron.core.tokenizers.text.libraries.huggingface_tokenizer")
    if seen is not None and not hasattr(seen, "AutoTokenizer"):  # imported before, without it
        importlib.reload(seen)
    return found


def lm_eval() -> Any:
    """lm-evaluation-harness, or the test is skipped."""
    transformers()
    return _import("lm_eval")


def _import(name: str) -> Any:
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
    return pytest.importorskip(name, reason=f"{name} is not installed")
