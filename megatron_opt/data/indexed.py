"""Megatron's indexed dataset, version 1: `P.bin` holds the tokens, `P.idx` says where each sequence lies.

P.idx: magic (9 bytes), version (uint64 = 1), dtype code (uint8), S = sequences (uint64), D = document bounds
(uint64), lengths (S × int32, tokens), pointers (S × int64, bytes into P.bin), bounds (D × int64, sequence
numbers), and for multimodal data modes (S × int8). All little-endian.
Source: megatron/core/datasets/indexed_dataset.py.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_opt.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32,
    8: np.uint16,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The dtype Megatron's own tool takes for a vocabulary: uint16 below 65,500 tokens, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


def bin_path(prefix: str | Path) -> Path:
    """The token file of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


def sidecar_path(prefix: str | Path) -> Path:
    """The record that `megatron-opt data index` leaves beside the dataset."""
    return Path(f"{prefix}.json")


def read_record(prefix: str | Path) -> dict[str, Any] | None:
    """The record beside a dataset, None where there is none: other people's P.json is left alone."""
    path = sidecar_path(prefix)
    try:
        if not path.is_file() or path.stat().st_size > 2**20:
            return None
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "tokenizer_sha256" in record else None


@dataclass(frozen=True)
class Index:
    """What a `.idx` holds; the arrays are memory-mapped."""

    dtype: np.dtype
    lengths: np.ndarray  # (S,) int32, tokens
    pointers: np.ndarray  # (S,) int64, bytes into .bin
    bounds: np.ndarray  # (D,) int64, the first sequence of each document, then S

    @property
    def documents(self) -> int:
        """Number of documents."""
        return max(len(self.bounds) - 1, 0)

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def write_index(stream: IO[bytes], dtype: type[np.generic], lengths: np.ndarray) -> None:
    """Write the `.idx` of documents of one sequence each; `lengths` (S,) in tokens."""
    sequences = len(lengths)
    pointers = np.zeros(sequences, dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    pointers *= np.dtype(dtype).itemsize
    stream.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, sequences + 1))
    stream.write(lengths.astype("<i4").tobytes())
    stream.write(pointers.tobytes())
    stream.write(np.arange(sequences + 1, dtype="<i8").tobytes())


def read_index(prefix: str | Path) -> Index:
    """Read and check `P.idx` against itself and the size of `P.bin`.

    Raises UserError: a file is missing, foreign, truncated, or the two do not belong together.
    """
    idx, tokens = idx_path(prefix), bin_path(prefix)
    for path in (idx, tokens):
        if not path.is_file():
            raise UserError(_missing(str(prefix), path))
    try:
        with idx.open("rb") as stream:
            header = stream.read(HEADER.size)
        size, bin_size = idx.stat().st_size, tokens.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {idx}: {error.strerror}") from None
    if header[: len(MAGIC)] != MAGIC[: len(header)] or not header:
        raise UserError(f"{idx} is not a Megatron index (wrong magic bytes); write it with `megatron-opt data index`")
    if len(header) < HEADER.size:
        raise UserError(f"{idx} is truncated: {size} bytes, a header alone has {HEADER.size}; index the corpus again")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != VERSION:
        raise UserError(f"{idx} has format version {version}, Megatron reads version {VERSION}; index the corpus again")
    if code not in DTYPES:
        raise UserError(f"{idx} has the unknown dtype code {code}; the file is corrupt, index the corpus again")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size not in (expected, expected + sequences):
        state = "truncated" if size < expected else "corrupt"
        raise UserError(f"{idx} is {state}: {size} bytes, its header promises {expected}; index the corpus again")
    index = _map(idx, np.dtype(DTYPES[code]), sequences, bounds)
    _check(index, idx, tokens, bin_size)
    return index


def read_tokens(prefix: str | Path, index: Index) -> np.ndarray:
    """The tokens of `P.bin` as one memory-mapped array."""
    path = bin_path(prefix)
    if path.stat().st_size == 0:
        return np.empty(0, dtype=index.dtype)
    return np.memmap(path, dtype=index.dtype, mode="r")


def _missing(prefix: str, path: Path) -> str:
    if prefix.endswith((".bin", ".idx")):
        return f"{path} does not exist; give the dataset as a prefix, {prefix[:-4]!r}"
    return f"{path} does not exist; write it with `megatron-opt data index --output-prefix {prefix}`"


def _map(idx: Path, dtype: np.dtype, sequences: int, bounds: int) -> Index:
    raw = np.memmap(idx, dtype=np.uint8, mode="r")

    def part(start: int, kind: Any, count: int) -> np.ndarray:
        return np.frombuffer(raw, dtype=kind, count=count, offset=start)

    lengths_at = HEADER.size
    pointers_at = lengths_at + 4 * sequences
    bounds_at = pointers_at + 8 * sequences
    return Index(
        dtype,
        part(lengths_at, "<i4", sequences),
        part(pointers_at, "<i8", sequences),
        part(bounds_at, "<i8", bounds),
    )


def _check(index: Index, idx: Path, tokens: Path, bin_size: int) -> None:
    sequences = len(index.lengths)
    if len(index.bounds) == 0 or index.bounds[0] != 0 or index.bounds[-1] != sequences:
        raise UserError(f"{idx} is corrupt: its documents do not cover its sequences; index the corpus again")
    if sequences == 0:
        return
    end = int(index.pointers[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    if end > bin_size:
        raise UserError(f"{tokens} is truncated: {bin_size} bytes, {idx.name} needs {end}; index the corpus again")
    if end < bin_size:
        raise UserError(
            f"{tokens} has {bin_size} bytes, {idx.name} describes {end};"
            " the two files are of different datasets, index the corpus again"
        )
