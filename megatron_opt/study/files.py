"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opt.errors import UserError


@contextmanager
def replace_with(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder that replaces `path` when the block ends well."""
    name = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from None
    finally:
        if name is not None and os.path.exists(name):
            os.unlink(name)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replace_with(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
