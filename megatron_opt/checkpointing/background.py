"""The writer of background saves: a process of each rank, forked before training, that shares one buffer with it.

    rank      tensors → buffer (a thread, during the next forward pass); then a message by socket
    writer    buffer → files, fsync, SHA-256, what is where; then an answer by socket
              rank 0's waits for the others' files, publishes, prunes, deletes, and answers once more

Megatron's own worker gets tensors by pickle, imports everything once more, and needs a GPU.
"""

import contextlib
import io
import json
import math
import mmap
import os
import pickle
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt.checkpointing import folders
from megatron_opt.files import write_atomic
from megatron_opt.training import signals

_ALIGNED = 64
_RESULTS = ".results-"  # of a rank: what it has written, and where
_LOOK = 0.02  # seconds
_HEADER = struct.Struct("<Q")
_DIED = "the process that writes checkpoints has died"

Items = Sequence[tuple[str, Sequence[Any], Sequence[Any]]]  # by file: name, items of byte strings, items of tensors


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the buffer."""

    offset: int
    dtype: Any
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Publication:
    """What rank 0's writer needs to make a checkpoint visible."""

    save: Path
    iteration: int
    ranks: int
    metadata: Any  # None: as the last time
    config: Any  # Megatron's note on the format
    keep_last: int
    keep_every: int


class Writer:
    """A rank's side of its writer."""

    def __init__(self, nice: int = 10) -> None:
        self._socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:  # not multiprocessing, which would wait at exit for a process that ignores its signal
            try:
                self._socket.close()
                _serve(theirs, nice)
            finally:
                os._exit(0)
        theirs.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint copy")
        self._copy: Future[None] | None = None
        self._lock = threading.Lock()
        self._buffer: mmap.mmap | None = None
        self._plan: Items | None = None
        self._views: list[Any] = []
        self._metadata: Any = None
        self._writing = self._publishing = 0
        self._written: deque[str | None] = deque()
        self._published: deque[dict[str, Any] | str] = deque()

    # Saves

    def save(
        self,
        folder: Path,
        rank: int,
        plan: Items,
        strings: Sequence[Any],
        tensors: Sequence[Any],
        constant_until_step: Sequence[bool],
        notes: dict[str, str] | None = None,
    ) -> None:
        """Hand a save over: tensors that are `constant_until_step` until `settle` are copied meanwhile, others (and a GPU's) at once.

        `strings` and `tensors` are in the order of the plan's items; the same plan object is sent once. An earlier save
        is waited for. `notes` are small files, by name.
        """
        while self.busy():
            self._receive(block=True)
        if plan is not self._plan:
            self._lay(plan, tensors)
        later = [keeps and not tensor.is_cuda for keeps, tensor in zip(constant_until_step, tensors, strict=True)]
        for view, tensor, wait in zip(self._views, tensors, later, strict=True):
            if not wait:
                view.copy_(tensor)
        self._writing += 1
        views = [view for view, wait in zip(self._views, later, strict=True) if wait]
        waiting = [tensor for tensor, wait in zip(tensors, later, strict=True) if wait]
        self._copy = self._thread.submit(self._deliver, views, waiting, ("save", folder, rank, strings, notes or {}))

    def _lay(self, plan: Items, tensors: Sequence[Any]) -> None:
        offset, slots, values = 0, [], iter(tensors)
        for _, _, items in plan:
            laid = []
            for _ in items:
                tensor = next(values)
                laid.append(Slot(offset, tensor.dtype, tuple(tensor.shape)))
                offset += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
            slots.append(laid)
        if self._buffer is None or len(self._buffer) < offset:
            self._views = []
            descriptor = os.memfd_create("checkpoint")  # /dev/shm is small in containers, and outlives a killed rank
            try:
                os.ftruncate(descriptor, max(offset, 1))
                self._buffer = mmap.mmap(descriptor, max(offset, 1))
                self._send(b"", descriptor)
            finally:
                os.close(descriptor)
        self._views = [_view(self._buffer, slot) for laid in slots for slot in laid]
        self._send(pickle.dumps(("plan", plan, slots)))
        self._plan = plan

    def _deliver(self, views: list[Any], tensors: list[Any], message: Any) -> None:
        import torch

        if views:
            with torch.no_grad():
                torch._foreach_copy_(views, tensors)
        self._send(pickle.dumps(message))

    def _send(self, data: bytes, descriptor: int | None = None) -> None:
        with self._lock, contextlib.suppress(OSError):  # a dead writer is noticed where its answer is awaited
            _send(self._socket, data, descriptor)

    def settle(self) -> None:
        """Wait until the tensors of the last save may change."""
        if self._copy is not None:
            self._copy.result()
            self._copy = None

    def busy(self) -> bool:
        """Whether a save is not yet written."""
        if self._writing:
            self._receive(block=False)
        return self._writing > 0

    def wait(self) -> None:
        """Until all saves are written."""
        while self._writing:
            self._receive(block=True)

    def written(self) -> str | None:
        """What went wrong with the oldest save whose answer has not been asked for."""
        return self._written.popleft()

    # Publishing

    def publish(self, what: Publication) -> None:
        """Rank 0: once every rank has written, write the small files and make the checkpoint visible."""
        metadata = None if what.metadata is self._metadata else what.metadata
        self._metadata = what.metadata
        self._publishing += 1
        message = pickle.dumps(("publish", Publication(**{**vars(what), "metadata": metadata})))
        self._thread.submit(self._send, message)  # after the save itself

    def cancel(self) -> None:
        """Rank 0: publish nothing; another rank cannot write."""
        self._thread.submit(self._send, pickle.dumps(("cancel",)))

    def published(self, block: bool) -> dict[str, Any] | str | None:
        """{"bytes", "pruned"} of the published checkpoint, what went wrong, or None as long as it is under way."""
        while not self._published and self._publishing:
            if not self._receive(block):
                return None
        return self._published.popleft() if self._published else None

    def _receive(self, block: bool) -> bool:
        """Take one answer; False where none is there."""
        if block:
            self.settle()
        try:
            if not block:
                self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            kind, answer = pickle.loads(_get(self._socket))
        except BlockingIOError:
            return False
        except (EOFError, OSError):
            kind, answer = ("save" if self._writing else "publish"), _DIED
        if kind == "save":
            self._writing -= 1
            self._written.append(answer)
        else:
            self._publishing -= 1
            self._published.append(answer)
        return True


def _view(buffer: Any, slot: Slot) -> Any:
    import torch

    if 0 in slot.shape:
        return torch.empty(slot.shape, dtype=slot.dtype)
    count = math.prod(slot.shape)
    return torch.frombuffer(buffer, dtype=slot.dtype, count=count, offset=slot.offset).view(slot.shape)


def _send(connection: socket.socket, data: bytes, descriptor: int | None = None) -> None:
    header = _HEADER.pack(len(data))
    if descriptor is None:
        connection.sendall(header + data)
    else:
        socket.send_fds(connection, [header], [descriptor])


def _get(connection: socket.socket) -> bytes:
    (size,) = _HEADER.unpack(_exactly(connection, _HEADER.size))
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    stream = io.BytesIO()
    while stream.tell() < size:
        part = connection.recv(min(size - stream.tell(), 1 << 20))
        if not part:
            raise EOFError
        stream.write(part)
    return stream.getvalue()


# ---- the process


def _serve(connection: socket.socket, nice: int) -> None:
    signals.serve_parent()
    with contextlib.suppress(OSError):
        os.nice(nice)
    buffer: Any = None
    plan: Items = ()
    slots: Sequence[Sequence[Slot]] = ()
    metadata: Any = None
    while True:
        try:
            header, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
            if descriptors:
                buffer = mmap.mmap(descriptors[0], 0)
                os.close(descriptors[0])
                continue
            if len(header) < _HEADER.size:
                header += _exactly(connection, _HEADER.size - len(header))
            kind, *rest = pickle.loads(_exactly(connection, _HEADER.unpack(header)[0]))
        except (EOFError, OSError):
            return
        if kind == "cancel":  # it has ended the waiting for the others already
            continue
        if kind == "plan":
            plan, slots = rest
            continue
        answer: Any = None
        try:
            if kind == "save":
                _write(plan, slots, buffer, *rest)
            else:
                metadata = rest[0].metadata or metadata
                _wait_for_all(rest[0], connection)
                answer = _publish(rest[0], metadata)
        except OSError as error:
            answer = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        except Exception as error:  # whatever it is, the rank must hear of it
            answer = " ".join(str(error).split())[:300] or type(error).__name__
        _send(connection, pickle.dumps((kind, answer)))
        if kind == "publish" and isinstance(answer, dict):
            folders.delete_discarded(rest[0].save)


def _write(
    plan: Items, slots: Any, buffer: Any, folder: Path, rank: int, strings: Sequence[bytes], notes: dict[str, str]
) -> None:
    """Write this rank's files in Megatron's format; then what is in them, for rank 0's writer."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

    for name, text in notes.items():
        write_atomic(folder / name, text)
    values = iter(strings)
    buckets = [
        (
            os.path.join(folder, name),
            name,
            (
                [(item, io.BytesIO(next(values))) for item in objects],
                [(item, _view(buffer, slot)) for item, slot in zip(items, laid, strict=True)],
            ),
        )
        for (name, objects, items), laid in zip(plan, slots, strict=True)
    ]
    transforms = [_StorageWriterTransforms()]

    def write(number: int) -> list[Any]:
        _, written = FileSystemWriterAsync.write_preloaded_data(transforms, number, buckets[number], None, None, True)
        if isinstance(written, Exception):
            raise written
        return written

    with ThreadPoolExecutor(max(len(buckets), 1)) as pool:  # --dist-ckpt-workers files
        results = [result for written in pool.map(write, range(len(buckets))) for result in written]
    folders.sum_files(folder, rank)
    rows = [
        (one.index.fqn, one.index.offset and [*one.index.offset], one.index.index, one.size_in_bytes,
         one.storage_data.relative_path, one.storage_data.offset, one.storage_data.length)
        for one in results
    ]  # fmt: skip
    write_atomic(folder / f"{_RESULTS}{rank}", json.dumps(rows))


def _read_results(path: Path) -> list[Any]:
    """What `_write` says that it has written, as torch wants it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult

    return [
        WriteResult(MetadataIndex(name, offset, number), size, _StorageInfo(*where))
        for name, offset, number, size, *where in json.loads(path.read_text())
    ]


def _wait_for_all(what: Publication, connection: socket.socket) -> None:
    """Until the files of all ranks are there; a message meanwhile says that one will not come."""
    folder = what.save / folders.STAGING / folders.name_of(what.iteration)
    wanted = {f"{_RESULTS}{rank}" for rank in range(what.ranks)}
    while not wanted <= set(os.listdir(folder)):
        if select.select([connection], [], [], _LOOK)[0]:
            raise InterruptedError("another rank could not write")


def _publish(what: Publication, metadata: Any) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.core import save_config
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    folder = what.save / folders.STAGING / folders.name_of(what.iteration)
    parts = [folder / f"{_RESULTS}{rank}" for rank in range(what.ranks)]
    FileSystemWriterAsync(folder).finish(metadata, [_read_results(part) for part in parts])
    for part in parts:
        part.unlink()
    save_config(what.config, str(folder))
    size = folders.publish(what.save, what.iteration)
    return {"bytes": size, "pruned": folders.prune(what.save, what.keep_last, what.keep_every)}
