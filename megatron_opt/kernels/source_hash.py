"""Hash of the extension's sources: setup.py compiles it in, the import compares it."""

import hashlib
from pathlib import Path


def source_hash(folder: Path) -> str:
    """First 16 hex digits of SHA-256 over names and contents of the C++ and CUDA files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
