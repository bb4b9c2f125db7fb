"""Optimizer state by parameter name, in whole-matrix coordinates: torch.distributed.checkpoint reshards it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_opt.distributed.shard_group import gather_objects
from megatron_opt.distributed.sharded_optimizer import ShardedOptimizer
from megatron_opt.distributed.state import StateEntry, local_entries
from megatron_opt.errors import UserError

_WHERE = (
    "this tensor of the optimizer's state lies in shards on several ranks, and this rank has only its own: save it by "
    "torch.distributed.checkpoint.save on all ranks (async_save takes no such tensors), or take "
    "optimizer.full_state_dict() on all ranks and save that."
)


class ShardedState(torch.Tensor):
    """A tensor of the state of which this rank has some rectangles, as torch.distributed.checkpoint takes it.

    It has the whole's shape and no values of its own: whatever would read them as if it had is refused.
    """

    parts: list[tuple[tuple[int, ...], Tensor]]  # first indices in the whole, and the live tensor

    @staticmethod
    def __new__(cls, shape: Sequence[int], parts: Sequence[tuple[tuple[int, ...], Tensor]]) -> "ShardedState":
        first = parts[0][1]
        made = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=first.dtype, device=first.device)
        made.parts = list(parts)
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        raise TypeError(_WHERE)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(_WHERE)

    def __deepcopy__(self, memo: Any) -> "ShardedState":
        return ShardedState(self.shape, [(at, copy.deepcopy(tensor, memo)) for at, tensor in self.parts])

    def to(self, *args: Any, **kwargs: Any) -> "ShardedState":
        """Itself where it is so already: training loops move a state to the device that it is on (accelerate)."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        here = device is None or device == self.device or device.type == self.device.type == "cpu"
        if not here or dtype not in (None, self.dtype):
            raise TypeError(_WHERE)
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShardedState({tuple(self.shape)}, {[(at, tuple(t.shape)) for at, t in self.parts]})"

    # torch.distributed.checkpoint's protocol of checkpointable tensors

    def __create_write_items__(self, fqn: str, whole: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), self.shape),
            )
            for chunk, (_, tensor) in zip(self.__create_chunk_list__(), self.parts, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), tensor.shape) for at, tensor in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(tensor for at, tensor in self.parts if torch.Size(at) == index.offset)


def _corner_and_shape(state_entry: StateEntry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A state_entry's first indices in its whole, and the whole's shape."""
    if state_entry.rect is None:
        return (0,) * state_entry.tensor.ndim, tuple(state_entry.tensor.shape)
    return (state_entry.rect.region.row0, state_entry.rect.region.col0), state_entry.shape


def _key(state_entry: StateEntry, param: str) -> str:
    """Its name among the state of its parameter: the tensor's, after the matrix's where the parameter has several."""
    suffix = state_entry.matrix.removeprefix(param).lstrip(".")
    return f"{suffix}.{state_entry.key}" if suffix else state_entry.key


def entries(engine: ShardedOptimizer, param_of: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The state by parameter name and key.

    Plain tensors where every rank has the whole (one process; element-wise rules on replicas), else ShardedState.
    """
    shard_group, matrices = engine.shard_groups[0], engine.matrix_steps[0].infos
    parts: dict[tuple[str, str], dict[tuple[int, ...], Tensor]] = {}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    everywhere: dict[tuple[str, str], bool] = {}
    for state_entry in local_entries(engine, 0):
        param = param_of[state_entry.matrix]
        name, (at, shape) = (param, _key(state_entry, param)), _corner_and_shape(state_entry)
        parts.setdefault(name, {}).setdefault(at, state_entry.tensor)
        shapes[name] = shape
        copies = (
            1
            if state_entry.rect is None or state_entry.matrix in matrices
            else round(1.0 / shard_group.weight[state_entry.rect.key])
        )
        everywhere[name] = copies == shard_group.size and tuple(state_entry.tensor.shape) == shape
    by_param: dict[str, dict[str, Tensor]] = {}
    for (param, key), tensors in sorted(parts.items()):
        whole = everywhere[param, key]
        by_param.setdefault(param, {})[key] = (
            tensors[(0,) * len(shapes[param, key])]
            if whole
            else ShardedState(shapes[param, key], list(tensors.items()))
        )
    return by_param


def load_entries(
    engine: ShardedOptimizer, param_of: Mapping[str, str], given: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Take state by parameter name: whole tensors, or the shards that `entries` has laid out and a checkpoint filled."""
    for state_entry in local_entries(engine, 0):
        param = param_of[state_entry.matrix]
        key = _key(state_entry, param)
        entry = given.get(param, {}).get(key)
        if entry is None:
            raise UserError(
                f"the state to be loaded has no {key} of {param}; it is another optimizer's, or one rank's share of it "
                "(see full_state_dict)."
            )
        state_entry.take(_part(entry, state_entry, f"{key} of {param}"))
    for param_shard in engine.param_shards():
        param_shard.publish()


def _part(entry: Tensor, state_entry: StateEntry, what: str) -> Tensor:
    """A state_entry's share of an entry."""
    at, shape = _corner_and_shape(state_entry)
    if tuple(entry.shape) != shape:
        raise UserError(
            f"the state to be loaded has {what} as {list(entry.shape)}, not {list(shape)}: another model's."
        )
    if isinstance(entry, ShardedState):
        tensors = [tensor for first, tensor in entry.parts if first == at and tensor.shape == state_entry.tensor.shape]
        if not tensors:
            raise UserError(
                f"the state to be loaded has another share of {what} than this rank's; load it by "
                "torch.distributed.checkpoint, or from full_state_dict()."
            )
        return tensors[0]
    return entry[tuple(slice(first, first + size) for first, size in zip(at, state_entry.tensor.shape))]


def whole_entries(
    engine: ShardedOptimizer, params: Sequence[str], by_param: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Entries with every tensor whole, on the CPU of every rank; collective, one parameter after another."""
    shard_group = engine.shard_groups[0]
    whole: dict[str, dict[str, Tensor]] = {}
    for param in params:
        mine = {
            key: (tuple(t.shape), [(at, p.cpu()) for at, p in _parts(t)]) for key, t in by_param.get(param, {}).items()
        }
        for theirs in gather_objects(mine, shard_group.group, shard_group.size):
            for key, (shape, parts) in theirs.items():
                into = whole.setdefault(param, {})
                for at, part in parts:
                    into.setdefault(key, torch.zeros(shape, dtype=part.dtype))
                    into[key][tuple(slice(a, a + n) for a, n in zip(at, part.shape))] = part
    return whole


def _parts(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    return tensor.parts if isinstance(tensor, ShardedState) else [((0,) * tensor.ndim, tensor)]
