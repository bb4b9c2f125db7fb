"""The record that tells whether a step was done, and one writer at a time."""

import contextlib
import fcntl
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.files import make_folder, sha256, write_errors, write_output


@contextlib.contextmanager
def sole_writer(lock: Path, outputs: list[Path]) -> Iterator[None]:
    """Hold `lock` while writing `outputs`, and sweep away what a killed run left of them.

    Raises UserError when another process holds it.
    """
    make_folder(lock.parent)
    with write_errors(lock):
        opened = lock.open("wb")
    with opened as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {outputs[0]}; wait for it, or give another output") from None
        try:
            for path in outputs:
                for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
                    left.unlink()
            yield
        finally:
            lock.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_output(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; raises UserError when the file is not one."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; delete it and make it again")
    return value


def input_sha256(path: Path) -> str:
    """Hex SHA-256 of a file; raises UserError when it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def already_done(
    record: Path, settings: dict[str, Any], outputs: list[Path], force: bool, lock: Path | None = None
) -> dict[str, Any] | None:
    """The record of an earlier call with the same settings and all its outputs in place, or None to start.

    Raises UserError, unless `force`, when `record` was written with other settings, or when an output is
    there without a record and no `lock` tells of a killed run: then it is the user's own.
    """
    if force:
        return None
    if not record.exists():
        strangers = [path for path in outputs if path.exists()]
        if strangers and (lock is None or not lock.exists()):
            raise UserError(
                f"{strangers[0]} exists and is not of this command; give another output, or --force to replace it"
            )
        return None
    done = read_json(record)
    before = done.get("settings", {})
    if before != settings:
        differing = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        raise UserError(
            f"{record} was made with other settings ({', '.join(differing)} differ);"
            " give another output, or --force to replace it"
        )
    files = done.get("files", {})
    complete = all(path.is_file() and files.get(path.name, {}).get("bytes") == path.stat().st_size for path in outputs)
    return done if complete else None
