"""Files that appear whole or not at all, and their digests."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_opt.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream that becomes `path`, on disk, where the block ends well; else `path` is as it was before."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(staged, 0o666 & ~mask)  # a temporary file is private; give it what a plain open() would have given
        os.replace(staged, path)
    finally:
        with suppress(OSError):
            os.unlink(staged)


def check_writable(path: Path) -> None:
    """Raise the OSError that writing `path` would end in, before the work that it is to hold; makes nothing."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    above = path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def write_atomic(path: Path, content: str | bytes) -> None:
    """`path` with the new content on disk, or as it was before; OSError says why not. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block (no space, permission) into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another output") from None


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents; raises UserError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; choose another output") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {folder}: permission denied; choose another output")
    return folder


@contextmanager
def replacing_output(path: Path) -> Iterator[IO[bytes]]:
    """`replacing` for a file that the user asked for: makes its folder; UserError says why not."""
    make_folder(path.parent)
    with write_errors(path), replacing(path) as stream:
        yield stream


def write_output(path: Path, content: str | bytes) -> None:
    """`write_atomic` for a file that the user asked for: UserError says why not."""
    with replacing_output(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file; OSError when it cannot be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
