"""Text to `.bin`/`.idx`: worker processes make a shard of each chunk of documents, the shards are joined.

A shard is named by the digest of what it was made from, so that a run that was killed takes up its finished
shards, and a changed corpus or tokenizer never meets stale ones.
"""

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opt.data import indexed
from megatron_opt.data.files import already_done, input_sha256, read_json, sole_writer, write_json
from megatron_opt.data.progress import byte_progress
from megatron_opt.data.read import COMPRESSED, lines, parse_line
from megatron_opt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_opt.errors import UserError
from megatron_opt.files import make_folder, replacing_output

CHUNK_BYTES = 4 * 2**20  # at most; small files get smaller chunks, for a bar that moves


@dataclass(frozen=True)
class Options:
    """How text becomes tokens."""

    tokenizer: str
    json_key: str = "text"
    append_eod: bool = True
    tiktoken_pattern: str = "v2"
    tiktoken_special_tokens: int = 1000

    def load(self) -> Tokenizer:
        """The tokenizer of these options."""
        return load_tokenizer(
            self.tokenizer, pattern=self.tiktoken_pattern, special_tokens=self.tiktoken_special_tokens
        )


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of the corpus."""

    source: str
    first_line: int
    lines: list[bytes]
    shard: Path  # prefix of its shard


def build_index(
    source: Path, prefix: str, options: Options, workers: int | None = None, force: bool = False
) -> dict[str, Any]:
    """Write `prefix.bin`, `prefix.idx` and the record `prefix.json`; returns the record.

    The files are, byte for byte, those of Megatron's own tool with the same tokenizer and `--append-eod`.
    A document that gives no token is left out. A second call with nothing changed returns the record at once.
    Raises UserError: unreadable, malformed or empty corpus; bad tokenizer; unwritable output; a dead worker.
    """
    if not source.is_file():
        raise UserError(f"the corpus {source} does not exist; make it with `megatron-opt data corpus`")
    if source.suffix == ".parquet":
        raise UserError(f"{source} is not JSONL; make it so with `megatron-opt data corpus --input {source}`")
    record_path = indexed.sidecar_path(prefix)
    if record_path.exists() and indexed.read_record(prefix) is None:
        raise UserError(f"{record_path} is no record of a dataset and would be lost; give another --output-prefix")
    tokenizer = options.load()
    make_folder(Path(prefix).absolute().parent)
    settings = {**asdict(options), "tokenizer": tokenizer.sha256(), "source": input_sha256(source)}
    outputs = [indexed.bin_path(prefix), indexed.idx_path(prefix)]
    parts = Path(f"{prefix}.parts")
    record = already_done(record_path, settings, outputs, force, parts / ".lock")
    if record is not None:
        return {**record, "megatron_flags": tokenizer.flags}
    key = repr([settings, np.dtype(indexed.token_dtype(tokenizer.vocab_size)).name]).encode()
    with sole_writer(parts / ".lock", outputs):
        with byte_progress() as progress:
            task = progress.add_task("tokenizing", total=_text_bytes(source))
            shards = []
            for chunk in _tokenized(_chunks(source, parts, key), options, _workers(source, workers)):
                progress.advance(task, sum(map(len, chunk.lines)))
                shards.append(chunk.shard)
        record = _join(source, prefix, shards, tokenizer, settings)
        shutil.rmtree(parts)
    return record


def _text_bytes(source: Path) -> int | None:
    return None if source.suffix in COMPRESSED else source.stat().st_size


def _workers(source: Path, asked: int | None) -> int:
    """As many as asked for or as there are cores, and not more than there are chunks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = _text_bytes(source)
    chunks = cores if size is None else -(-size // _chunk_bytes(source))
    return min(asked or cores, chunks)


def _chunk_bytes(source: Path) -> int:
    return min(CHUNK_BYTES, max(source.stat().st_size // 64, 2**18))


def _chunks(source: Path, parts: Path, key: bytes) -> Iterator[Chunk]:
    batch: list[bytes] = []
    first, size, full = 1, 0, _chunk_bytes(source)
    for number, line in lines(source):
        batch.append(line)
        size += len(line)
        if size >= full:
            yield Chunk(str(source), first, batch, parts / _digest(key, batch))
            batch, first, size = [], number + 1, 0
    if batch:
        yield Chunk(str(source), first, batch, parts / _digest(key, batch))


def _digest(key: bytes, batch: list[bytes]) -> str:
    digest = hashlib.blake2b(key, digest_size=16)
    for line in batch:
        digest.update(line)
    return digest.hexdigest()


def _tokenized(chunks: Iterator[Chunk], options: Options, workers: int) -> Iterator[Chunk]:
    """The chunks in order, each once its shard is on disk; at most two a worker are in memory."""
    if workers <= 1:
        _start(options)
        for chunk in chunks:
            if not _done(chunk.shard):
                _tokenize(chunk)
            yield chunk
        return
    # spawn: forking a process that runs threads can deadlock
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(options,))
    waiting: deque[tuple[Chunk, Future[None] | None]] = deque()

    def finish() -> Chunk:
        chunk, future = waiting.popleft()
        if future is not None:
            future.result()
        return chunk

    try:
        for chunk in chunks:
            with _interrupts_held():  # a submission may start a worker, which inherits this
                waiting.append((chunk, None if _done(chunk.shard) else pool.submit(_tokenize, chunk)))
            if len(waiting) >= 2 * workers:
                yield finish()
        while waiting:
            yield finish()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?); run the same command again, with fewer --workers,"
            " and it goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_tokenizer: Tokenizer
_options: Options


def _start(options: Options) -> None:
    global _tokenizer, _options
    _tokenizer, _options = options.load(), options


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; a process started in it never gets it, from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(options: Options) -> None:
    # A parent that is killed closes nothing that a worker waits for: end with it.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _start(options)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _done(shard: Path) -> bool:
    return shard.with_suffix(".json").exists()


def _tokenize(chunk: Chunk) -> None:
    """Write the shard of a chunk: `.bin` tokens, `.npy` lengths, last `.json` text bytes and largest id."""
    dtype = indexed.token_dtype(_tokenizer.vocab_size)
    ids: list[int] = []
    lengths = []
    text_bytes = 0
    for offset, line in enumerate(chunk.lines):
        text = parse_line(line, _options.json_key, chunk.source, chunk.first_line + offset)
        new = _tokenizer.encode(text) if text else []
        if not new:
            continue
        if _options.append_eod:
            new.append(_tokenizer.eod)
        ids.extend(new)
        lengths.append(len(new))
        text_bytes += len(text.encode()) if text else 0
    tokens = np.array(ids, dtype=dtype)
    with replacing_output(chunk.shard.with_suffix(".bin")) as stream:
        stream.write(tokens.tobytes())
    with replacing_output(chunk.shard.with_suffix(".npy")) as stream:
        np.save(stream, np.array(lengths, dtype=np.int32))
    largest = int(tokens.max()) if len(tokens) else -1
    write_json(chunk.shard.with_suffix(".json"), {"text_bytes": text_bytes, "max_token_id": largest})


def _join(
    source: Path, prefix: str, shards: list[Path], tokenizer: Tokenizer, settings: dict[str, Any]
) -> dict[str, Any]:
    lengths = np.concatenate([np.load(shard.with_suffix(".npy")) for shard in shards] or [np.empty(0, np.int32)])
    if len(lengths) == 0:
        raise UserError(f"the corpus {source} holds no text; there is nothing to index")
    dtype = indexed.token_dtype(tokenizer.vocab_size)
    parts = [read_json(shard.with_suffix(".json")) for shard in shards]
    with contextlib.suppress(FileNotFoundError):  # the record of other files must not stand beside the new ones
        indexed.sidecar_path(prefix).unlink()
    with replacing_output(indexed.bin_path(prefix)) as stream:
        for shard in shards:
            with shard.with_suffix(".bin").open("rb") as part:
                shutil.copyfileobj(part, stream, 2**20)
    with replacing_output(indexed.idx_path(prefix)) as stream:
        indexed.write_index(stream, dtype, lengths)
    tokens = int(lengths.sum(dtype=np.int64))
    text_bytes = sum(part["text_bytes"] for part in parts)
    outputs = (indexed.bin_path(prefix), indexed.idx_path(prefix))
    record = {
        "documents": len(lengths),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / tokens,
        "max_token_id": max(part["max_token_id"] for part in parts),
        "tokenizer": str(tokenizer.path),
        "tokenizer_sha256": tokenizer.sha256(),
        "tokenizer_kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": settings["append_eod"],
        "megatron_flags": tokenizer.flags,
        "settings": settings,
        "files": {path.name: {"bytes": path.stat().st_size} for path in outputs},
    }
    write_json(indexed.sidecar_path(prefix), record)
    return record
