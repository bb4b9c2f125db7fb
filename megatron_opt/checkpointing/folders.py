"""A folder of checkpoints on disk: which are whole, which are damaged, which may go. Knows nothing of Megatron's state.

SAVE/iter_0000100/                        published by one rename; integrity.json lists SHA-256 by file
SAVE/latest_checkpointed_iteration.txt    Megatron's tracker, replaced in one step after the rename
SAVE/.saving/iter_0000200/                being written: not there for any reader
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_opt.files import sha256, write_atomic

MANIFEST = "integrity.json"  # Megatron's own name and format, so that its --verify-integrity reads ours
TRACKER = "latest_checkpointed_iteration.txt"
STAGING = ".saving"
TRASH = ".deleting"
MISMATCH = "does not match its checksum"
_SUMS = ".sums-"
_NAME = re.compile(r"iter_(\d{7,})")


def name_of(iteration: int) -> str:
    """Megatron's name of an iteration's folder."""
    return f"iter_{iteration:07d}"


def iterations(save: Path) -> list[int]:
    """Published iterations, newest first."""
    if not save.is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in save.iterdir() if entry.is_dir())
    return sorted((int(match.group(1)) for match in matches if match), reverse=True)


def tracked(save: Path) -> str | None:
    """What the tracker says: an iteration's number, "release", or whatever has become of it; None where there is none."""
    path = save / TRACKER
    return path.read_text(errors="replace").strip() if path.is_file() else None


def nonsense(save: Path) -> str | None:
    """What is wrong with the tracker, in a sentence; Megatron would end such a start as if all were well."""
    text = tracked(save)
    if text is None or text == "release" or re.fullmatch(r"[0-9]+", text):
        return None
    return f"{save / TRACKER} holds {text[:40]!r} in place of an iteration number; write the number of a whole checkpoint into it"


def holds_one(save: Path) -> bool:
    """Whether there is a checkpoint, by the tracker or by its name."""
    return (save / TRACKER).is_file() or bool(iterations(save))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _members(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(_SUMS)
    )


def sum_files(folder: Path, rank: int) -> None:
    """Digest the files that this rank wrote (torch names them `__RANK_N.distcp`), for `publish` to collect."""
    sums = {path.name: sha256(path) for path in sorted(folder.glob(f"__{rank}_*"))}
    (folder / f"{_SUMS}{rank}").write_text(json.dumps(sums))


def publish(save: Path, iteration: int) -> int:
    """Turn SAVE/.saving/iter_N, written by all ranks, into SAVE/iter_N and the newest checkpoint; returns its bytes.

    Files that no rank has digested are digested here. Every name is on disk before the rename makes it visible.
    """
    folder = save / STAGING / name_of(iteration)
    sums: dict[str, str] = {}
    for part in folder.glob(f"{_SUMS}*"):
        sums.update(json.loads(part.read_text()))
        part.unlink()
    files, size = {}, 0
    for name in _members(folder):
        path = folder / name
        if name not in sums:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        files[name] = sums.get(name) or sha256(path)
        size += path.stat().st_size
    write_atomic(folder / MANIFEST, json.dumps({"algorithm": "sha256", "files": files}, indent=2))
    sync_folder(folder)
    target = save / name_of(iteration)
    if target.exists():  # an older save of this iteration, damaged or of a run that was rolled back
        discard(save, iteration)
    os.rename(folder, target)
    sync_folder(save)
    write_atomic(save / TRACKER, str(iteration))
    sync_folder(save)
    return size


def discard(save: Path, iteration: int) -> None:
    """Take a checkpoint out of sight at once; `delete_discarded` deletes it."""
    trash = save / TRASH
    trash.mkdir(exist_ok=True)
    target = trash / name_of(iteration)
    if target.exists():
        shutil.rmtree(target, ignore_errors=True)
    os.rename(save / name_of(iteration), target)


def set_apart(save: Path, iteration: int) -> None:
    """Rename a damaged checkpoint to iter_N.damaged, which no run reads or deletes."""
    source = save / name_of(iteration)
    with contextlib.suppress(OSError):
        os.rename(source, source.with_name(f"{source.name}.damaged"))


def delete_discarded(save: Path, staging: bool = False) -> None:
    """Delete discarded checkpoints, and with `staging` what a killed save has left."""
    for name in (TRASH, STAGING) if staging else (TRASH,):
        shutil.rmtree(save / name, ignore_errors=True)


def retained(numbers: list[int], last: int, every: int) -> set[int]:
    """Iterations to keep of `found`: the newest `last` and multiples of `every`; 0 for `last` keeps all."""
    if not last:
        return set(numbers)
    newest = sorted(numbers, reverse=True)[:last]
    return set(newest) | {n for n in numbers if every and n % every == 0}


def prune(save: Path, last: int, every: int) -> list[int]:
    """Discard what is not retained, links left alone; returns what went."""
    numbers = iterations(save)
    gone = []
    for iteration in sorted(set(numbers) - retained(numbers, last, every)):
        if not (save / name_of(iteration)).is_symlink():
            with contextlib.suppress(OSError):
                discard(save, iteration)
                gone.append(iteration)
    return gone


def manifest(save: Path, iteration: int) -> dict[str, str] | None:
    """Digest by file name, None where there is no manifest; ValueError where there is an unreadable one."""
    path = save / name_of(iteration) / MANIFEST
    if not path.is_file():
        return None
    content: Any = json.loads(path.read_text())
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or content.get("algorithm") != "sha256":
        raise ValueError("no SHA-256 by file name in it")
    return files


def damage(folder: Path, files: dict[str, str], share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with every `shares`-th file of a checkpoint from `share` on, or None."""
    for name in sorted(files)[share::shares]:
        path = folder / name
        try:
            if sha256(path) != files[name]:
                return f"{name} {MISMATCH}"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None
