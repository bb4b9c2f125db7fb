"""Packages that `make setup` keeps in folders of their own, so that no other test imports them."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest


def transformers() -> Any:
    """Hugging Face's transformers, or the test is skipped."""
    folder = str(Path(sys.prefix) / "transformers")
    if folder not in sys.path:
        sys.path.append(folder)
    found = pytest.importorskip("transformers", reason="transformers is not installed")
    seen = sys.modules.get("megatron.core.tokenizers.text.libraries.huggingface_tokenizer")
    if seen is not None and not hasattr(seen, "AutoTokenizer"):  # imported before, without it
        importlib.reload(seen)
    return found
