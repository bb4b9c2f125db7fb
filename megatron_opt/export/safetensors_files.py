"""Sharded safetensors as Hugging Face lays them out: model.safetensors, or shards and model.safetensors.index.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.extras import require
from megatron_opt.files import write_atomic

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> list[str]:
    """Write tensors into shards of at most `limit` bytes (a larger tensor has one of its own); returns the files' names."""
    save = require("safetensors.torch").save_file
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        if pending:
            save(pending, str(folder / f".shard-{len(shards)}"), metadata={"format": "pt"})
            shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        if size + tensor.nbytes > limit:
            flush()
        pending[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    for number, name in enumerate(names):
        (folder / f".shard-{number}").rename(folder / name)
    if len(names) > 1:
        where = {tensor: names[number] for number, shard in enumerate(shards) for tensor in shard}
        write_atomic(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    return names


class Tensors:
    """Tensors of a Hugging Face folder by name, read when asked for."""

    def __init__(self, folder: Path):
        """Raises UserError for missing, shortened or damaged files."""
        opened = require("safetensors").safe_open
        self._where: dict[str, Any] = {}
        for name, expected in _files(folder).items():
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing, {INDEX} names it; fetch it again.")
            try:
                file = opened(str(path), framework="pt")
                names = list(file.keys())
            except Exception as error:  # the package's own class is not exported alike by its versions
                raise UserError(f"{path} is cut short or no safetensors file ({error}); fetch it again.") from None
            if absent := sorted(expected.difference(names)):
                raise UserError(f"{path} lacks {absent[0]}, which {INDEX} looks for there; fetch both again.")
            self._where.update(dict.fromkeys(names, file))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def __call__(self, name: str) -> Tensor:
        """The tensor of that name; UserError where there is none."""
        if name not in self._where:
            raise UserError(
                f"the safetensors files have no {name}; they are not of the model that config.json describes."
            )
        return self._where[name].get_tensor(name)


def _files(folder: Path) -> dict[str, set[str]]:
    index = folder / INDEX
    if index.is_file():
        try:
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names_of: dict[str, set[str]] = {}
            for tensor, name in where.items():
                names_of.setdefault(str(name), set()).add(tensor)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no index of safetensors files ({error!r}); fetch it again.") from None
        if any(Path(name).name != name for name in names_of):
            raise UserError(f"{index} names files outside its folder; fetch it again.")
        return names_of
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    raise UserError(f"{folder} has no {SINGLE} nor {INDEX}; give the folder of a model in safetensors.")
