"""What the pickles of a checkpoint would import, found without importing it.

torch reads `.metadata` and the small objects of a torch_dist checkpoint by pickle, which runs whatever the file says.
Here they are read once with every name replaced by a class that does nothing, and names outside a short list refused.
"""

import io
import pickle
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
    "torch.storage": {"UntypedStorage", "TypedStorage"},
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

    def find_class(self, module: str, name: str) -> Any:
        self.names.add((module, name))
        return _Inert

    def persistent_load(self, key: Any) -> Any:
        return _Inert()


def _is_torch_type(name: str) -> bool:
    import torch

    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def _refused(stream: Any) -> set[str]:
    reader = _Names(stream)
    reader.load()
    return {
        f"{module}.{name}"
        for module, name in reader.names
        if name not in _ALLOWED.get(module, ()) and not (module == "torch" and _is_torch_type(name))
    }


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
    found: dict[str, set[str]] = {}

    def look(where: str, stream: Any) -> None:
        try:
            names = _refused(stream)
        except Exception:  # a damaged or hostile pickle may raise anything
            names = {"unreadable"}
        if names:
            found[where] = names

    if (folder / ".metadata").is_file():
        with (folder / ".metadata").open("rb") as stream:
            look(".metadata", stream)
        if found:
            return found
        for name, data in _objects(folder):
            try:
                parts = list(_pickles_of_zip(data))
            except zipfile.BadZipFile:
                parts = [data]
            for part in parts:
                look(name, io.BytesIO(part))
    for path in sorted(folder.rglob("*.pt")):
        try:
            parts = list(_pickles_of_zip(path.read_bytes()))
        except zipfile.BadZipFile:
            parts = [path.read_bytes()]
        for part in parts:
            look(path.name, io.BytesIO(part))
    return found
