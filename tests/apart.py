"""Packages that `make setup` keeps in folders of their own, so that no other test imports them."""

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = str(Path(sys.prefix) / "transformers")


def transformers() -> Any:
    """Hugging Face's transformers, or the test is skipped."""
    return _import("transformers")


def lm_eval() -> Any:
    """lm-evaluation-harness, or the test is skipped."""
    return _import("lm_eval")


def _import(name: str) -> Any:
    if FOLDER not in sys.path:
        sys.path.append(FOLDER)
    return pytest.importorskip(name, reason=f"{name} is not installed")
