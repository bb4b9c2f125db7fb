"""Packages that `make setup` keeps in folders of their own, so that no other test imports them."""

import sys
from pathlib import Path
from typing import Any

import pytest


def transformers() -> Any:
    """Hugging Face's transformers, or the test is skipped."""
    folder = str(Path(sys.prefix) / "transformers")
    if folder not in sys.path:
        sys.path.append(folder)
    return pytest.importorskip("transformers", reason="transformers is not installed")
