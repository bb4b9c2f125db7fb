"""What the pickles of a checkpoint would import, found without importing it.

torch reads `.metadata` and the small objects of a torch_dist checkpoint by pickle, which runs whatever the file says.
Here they are read once with every name replaced by a class that does nothing, and names outside a short list refused.
A pickle inside one (a tensor's bytes, Transformer Engine's `_extra_state`) is read in the same way.
"""

import contextlib
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ALLOWED = {
    "__builtin__": {"set", "frozenset", "bytearray", "complex"},
    "builtins": {"set", "frozenset", "bytearray", "complex"},
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "collections": {"OrderedDict", "defaultdict", "deque"},
    "datetime": {"datetime", "timedelta"},
    "io": {"BytesIO"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "signal": {"Signals"},
    "transformer_engine.common.recipe": {
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "MMParams",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
        "QParams",
        "_FormatHelper",
    },
    "types": {"SimpleNamespace"},
    "numpy": {"dtype", "ndarray"},
    "numpy.dtypes": {"UInt32DType"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "torch": {"Size", "device", "dtype", "Tensor"},
    "torch._C": {"Generator"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch.serialization": {"_get_layout"},
    "torch.storage": {"UntypedStorage", "TypedStorage", "_load_from_bytes"},  # what the last one gets is read too
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.enums": {"ModelType"},
    "megatron.core.safe_globals": {"safe_load_from_bytes"},  # torch's, in Megatron's pickles
    "megatron.core.extensions.transformer_engine": {"TEDelayedScaling"},
    "megatron.core.optimizer": {"OptimizerConfig"},
    "megatron.core.optimizer.optimizer_config": {"OptimizerConfig"},
    "megatron.core.rerun_state_machine": {"RerunDiagnostic", "RerunMode", "RerunState"},
    "megatron.core.transformer.enums": {
        "AttnBackend",
        "AttnMaskType",
        "AttnType",
        "CudaGraphModule",
        "CudaGraphScope",
        "InferenceCudaGraphScope",
        "LayerType",
        "ModelType",
    },
}


_LOADERS = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
_EXTRA_STATE = "_extra_state"
_EXTRA_STATE_SWITCH = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save's format without zip


class _Inert:
    """Takes every way in which a pickle builds an object, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...
    def add(self, value: Any) -> None: ...


class _Names(pickle.Unpickler):
    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.names: set[tuple[str, str]] = set()
        self.saved: list[bytes] = []  # what torch would read as a file of its own

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        if (module, name) in _LOADERS:
            return self._note_saved
        return _Inert

    def _note_saved(self, data: bytes) -> _Inert:
        if type(data) is not bytes:
            raise ValueError("a tensor's bytes are made by code")
        self.saved.append(data)
        return _Inert()

    def persistent_load(self, key: Any) -> Any:
        return _Inert()


def _is_torch_type(name: str) -> bool:
    import torch

    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def _refused(stream: Any) -> set[str]:
    reader = _Names(stream)
    reader.load()
    refused = {
        f"{module}.{name}"
        for module, name in reader.names
        if name not in _ALLOWED.get(module, ()) and not (module == "torch" and _is_torch_type(name))
    }
    return refused.union(*(_refused_in_saved(data) for data in reader.saved))


def _refused_in_saved(data: bytes) -> set[str]:
    """Of the format without zip that pickled tensors are in: five pickles, then numbers. torch would try tar first."""
    stream = io.BytesIO(data)
    if not data.startswith(_TORCH_MAGIC) or tarfile.is_tarfile(io.BytesIO(data)):
        raise ValueError("no tensor as pickle stores it")
    return set().union(*(_refused(stream) for _ in range(5)))


def _refused_in_extra_state(data: bytes) -> set[str]:
    """Of what Transformer Engine would unpickle; `data` is harmless itself, and is read as Megatron reads it."""
    import torch

    with torch.serialization.safe_globals([io.BytesIO]):
        values = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    refused: set[str] = set()
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, torch.Tensor) and value.numel():
            refused |= _refused(io.BytesIO(value.numpy().tobytes()))
        elif isinstance(value, io.BytesIO):
            for part in _pickles_of_zip(value.getvalue()):
                refused |= _refused(io.BytesIO(part))
    return refused


@contextlib.contextmanager
def checked_extra_state() -> Iterator[None]:
    """Let Transformer Engine load the pickles of a checkpoint in which `refused_names` has found nothing."""
    before = os.environ.get(_EXTRA_STATE_SWITCH)
    os.environ[_EXTRA_STATE_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_EXTRA_STATE_SWITCH)
        if before is not None:
            os.environ[_EXTRA_STATE_SWITCH] = before


def _pickles_of_zip(data: bytes) -> Iterator[bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for name in archive.namelist():
            if name.endswith(".pkl"):
                yield archive.read(name)


def _objects(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every object that `.metadata`, already found harmless, says is stored by pickle."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    with (folder / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (folder / info.relative_path).open("rb") as stream:
                stream.seek(info.offset)
                yield index.fqn, stream.read(info.length)


def refused_names(folder: Path) -> dict[str, set[str]]:
    """Names outside the list that loading `folder` would import, by the object that wants them; {} is harmless.

    An object that cannot be read as a pickle at all is refused too, as "unreadable".
    """
    refused: dict[str, set[str]] = {}

    def look(where: str, stream: Any, read: Any = _refused) -> None:
        try:
            names = read(stream)
        except Exception:  # a damaged or hostile pickle may raise anything
            names = {"unreadable"}
        if names:
            refused[where] = names

    if (folder / ".metadata").is_file():
        with (folder / ".metadata").open("rb") as stream:
            look(".metadata", stream)
        if refused:
            return refused
        for name, data in _objects(folder):
            try:
                parts = list(_pickles_of_zip(data))
            except zipfile.BadZipFile:
                parts = [data]
            for part in parts:
                look(name, io.BytesIO(part))
            if _EXTRA_STATE in name and name not in refused:
                look(name, data, _refused_in_extra_state)
    for path in sorted(folder.rglob("*.pt")):
        try:
            parts = list(_pickles_of_zip(path.read_bytes()))
        except zipfile.BadZipFile:
            parts = [path.read_bytes()]
        for part in parts:
            look(path.name, io.BytesIO(part))
    return refused


def refusal(folder: Path) -> str | None:
    """Why the pickles of a checkpoint are not read: "FILE is unreadable" or "FILE would import NAMES"; None where they are."""
    refused = refused_names(folder)
    if not refused:
        return None
    where, names = next(iter(refused.items()))
    return f"{where} is unreadable" if names == {"unreadable"} else f"{where} would import {', '.join(sorted(names))}"
