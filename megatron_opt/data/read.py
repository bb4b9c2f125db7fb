"""Documents of user text: JSONL, plain text and Parquet, bare or compressed with gzip or zstd."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, cast

from megatron_opt.errors import UserError
from megatron_opt.extras import require

JSONL = {".jsonl", ".ndjson", ".json"}
TEXT = {".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc"}
COMPRESSED = {".gz", ".zst"}


@dataclass(frozen=True)
class Document:
    """One document and where it comes from."""

    text: str
    origin: str  # file, or file and line or row


def find_files(inputs: list[str]) -> list[Path]:
    """Files of the given files, folders (searched for known suffixes) and globs, in sorted order, each once.

    Raises UserError when one of them holds nothing.
    """
    paths: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = [file for file in sorted(path.rglob("*")) if file.is_file() and _known(file)]
        else:
            matches = [Path(file) for file in sorted(glob(name, recursive=True)) if os.path.isfile(file)]
        if not matches and path.is_dir():
            raise UserError(f"the folder {name} holds no text file ({', '.join(sorted(JSONL | TEXT | {'.parquet'}))})")
        if not matches:
            raise UserError(f"no file matches {name}; check the path")
        paths.update((file, None) for file in matches)
    return list(paths)


def documents(path: Path, json_key: str = "text") -> Iterator[Document]:
    """Documents of one file: each row of JSONL or Parquet, or the whole of a text file.

    Raises UserError naming file and line: malformed JSON, missing key or column, bytes that do not decode.
    """
    suffix = _suffix(path)
    if suffix == ".parquet":
        yield from _parquet(path, json_key)
    elif suffix in JSONL:
        for number, line in lines(path):
            text = parse_line(line, json_key, path, number)
            if text is not None:
                yield Document(text, f"{path}:{number}")
    else:
        with closing(open_binary(path)) as stream:
            yield Document(_decode(read_all(stream, path), path), str(path))


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, decompressed."""
    with closing(open_binary(path)) as stream:
        iterator = enumerate(stream, 1)
        while True:
            try:
                item = next(iterator, None)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"cannot read {path}: {_reason(error)}") from None
            if item is None:
                return
            yield item


def parse_line(line: bytes, json_key: str, path: Path | str, number: int) -> str | None:
    """The text of one line of JSONL, None for a blank line; raises UserError naming file and line."""
    if not line.strip():
        return None
    where = f"{path}, line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
        raise UserError(f"{where}: malformed JSON ({reason}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is expected, not {type(row).__name__}")
    if json_key not in row:
        raise UserError(f"{where}: no key {json_key!r}, there are {_names(row)}; choose with --json-key")
    return _text(row[json_key], where, json_key)


def open_binary(path: Path) -> io.BufferedIOBase:
    """The decompressed bytes of a file."""
    try:
        if path.suffix == ".gz":
            return cast(io.BufferedIOBase, gzip.open(path, "rb"))
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return io.BufferedReader(_Zstd(raw), 2**20) if path.suffix == ".zst" else raw


def read_all(stream: io.BufferedIOBase, path: Path) -> bytes:
    """All of a stream; raises UserError when the file is damaged."""
    try:
        return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from None


class _Zstd(io.RawIOBase):
    """Decompressed zstd frames; a truncated frame is an error, which the package's own reader passes over."""

    def __init__(self, raw: io.BufferedIOBase):
        zstandard = require("zstandard")
        self._raw, self._package, self._pending = raw, zstandard, b""
        self._frame: Any = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._rest or self._raw.read(2**17)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the zstd data is truncated")
                return 0
            if self._frame is None:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            try:
                self._pending = self._frame.decompress(data)
            except self._package.ZstdError as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _parquet(path: Path, column: str) -> Iterator[Document]:
    pyarrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {column!r}, there are {names}; choose with --json-key")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield Document(_text(value, f"{path}, row {row}", column), f"{path}:{row}")
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def _text(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} holds {type(value).__name__}, text is expected; choose with --json-key")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {key!r} holds half a surrogate pair, which is not text; repair the line") from None
    return value


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _known(path: Path) -> bool:
    return _suffix(path) in JSONL | TEXT | {".parquet"}


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
