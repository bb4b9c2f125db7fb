"""Optimizer state in checkpoints: by logical matrix and whole-matrix coordinates, so that any layout loads any other.

Tensors with a matrix's rows (fp32 main copies, element-wise state, momentum) are saved as they lie: each rank names the
rectangles of the whole matrix that it holds, and reads those that it wants. Stacks of square blocks (factors, bases) are
tall matrices to this end; what is left (flags, norms) is saved whole. 8-bit state is saved as the fp32 values that its
codes stand for, which give the same codes again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opt.distributed import packed_state
from megatron_opt.distributed.compute_shards import shape2d
from megatron_opt.distributed.elementwise import ElementwiseStep
from megatron_opt.distributed.host_state import HostStates
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.param_shards import Rect
from megatron_opt.distributed.shard_group import ShardGroup, gather_objects
from megatron_opt.distributed.weight_average import WeightAverage
from megatron_opt.errors import UserError
from megatron_opt.layout.region import Region
from megatron_opt.optimizers.base import StateKind
from megatron_opt.optimizers.groups import Group

FORMAT = "megatron_opt.2"
_PADDED = ("embedding", "output")  # their rows depend on how the vocabulary is padded


class Keeper(Protocol):
    """What is saved of an optimizer, by shard group and by group."""

    groups: list[Group]
    param_groups: list[dict[str, Any]]
    shard_groups: list[ShardGroup]
    element_steps: list[ElementwiseStep]
    matrix_steps: list[MatrixStep]
    stored: list[Any]
    step_number: int
    device: torch.device
    host: HostStates
    average: WeightAverage | None
    group_optimizers: list[Any]

    def ensure_states(self) -> None: ...

    def param_shards(self) -> list[Any]: ...


@dataclass
class StateEntry:
    """What one entry of a checkpoint holds of this rank's state."""

    key: str
    matrix: str
    tensor: Tensor  # in the shape in which it is saved; it shares the state's memory, but for 8-bit state
    rect: Rect | None = None  # its place in the whole
    shape: tuple[int, int] = (0, 0)  # of the whole; both None and (0, 0) where the tensor is the whole
    codes: packed_state.Codes | None = None
    replica: int = 0
    alike: list[Tensor] = field(default_factory=list)  # of other parts on this rank, equal to `tensor`

    def take(self, value: Tensor) -> None:
        """A checkpoint's value into the state."""
        for tensor in (self.tensor, *self.alike):
            tensor.copy_(value)
        if self.codes is not None:
            self.codes.encode(self.tensor.view(-1))

    @property
    def name(self) -> str:
        """Its name on this rank."""
        corner = self.replica if self.rect is None else f"{self.rect.region.row0}.{self.rect.region.col0}"
        return f"{self.key}.{self.matrix}.{corner}"


def _with_region(
    key: str, rect: Rect, flat: Tensor, shape: tuple[int, int], codes: packed_state.Codes | None = None
) -> StateEntry:
    tensor = flat.detach().view(rect.region.shape)
    return StateEntry(key, rect.matrix, tensor, rect, shape, codes)


def whole_regions(step: MatrixStep) -> Iterator[tuple[str, str, Tensor, tuple[int, int] | None, Rect | None, int]]:
    """Every tensor of a matrix step's state: (key, matrix, tensor, whole shape, place, index of its part).

    Tensors with a matrix's rows have their place in it; stacks of square blocks are the rows of one matrix. Others have
    no shape and no place: they are the same at every part.
    """
    for key_of, state in sorted(step.states.items()):
        (name, index), part, info = key_of, step.mine[key_of], step.infos[key_of[0]]
        stacks, spec = _block_positions(step, key_of), step.optimizers[name].state_spec(step.submatrix_infos[key_of])
        region, (rows, cols) = part.bounds, shape2d(info)
        for key, tensor in sorted(state.items()):
            match spec[key]:
                case StateKind.BLOCKS:
                    yield from _stack(name, key, tensor, stacks, index)
                case StateKind.MATRIX:
                    yield key, name, tensor, (rows, cols), Rect(name, region), index
                case StateKind.ROWS:
                    yield key, name, tensor, (rows, 1), Rect(name, Region(region.row0, region.row1, 0, 1)), index
                case _:
                    yield key, name, tensor, None, None, index
    for (name, index), state in sorted(step.shared.items()):
        stacks, spec = (
            _block_positions(step, (name, index)),
            step.optimizers[name].state_spec(step.submatrix_infos[name, index]),
        )
        for key, tensor in sorted(state.items()):
            if spec[key] is StateKind.BLOCKS:
                yield from _stack(name, key, tensor, stacks, index)
            else:
                yield key, name, tensor, None, None, index


BlockPositions = dict[
    str, tuple[str, list[int], int]
]  # by key of a stack: its key in the whole, its blocks' numbers, of how many


def _block_positions(step: MatrixStep, key: tuple[str, int]) -> BlockPositions:
    """Where the stacks of a part's submatrix lie in the matrix's; nothing where the submatrix is the matrix."""
    submatrix = step.submatrices[key]
    partition = None if submatrix.is_whole else step.optimizers[key[0]].partition(step.infos[key[0]])
    return (
        partition.block_positions((submatrix.area.row0, submatrix.area.col0), submatrix.area.shape) if partition else {}
    )


def _stack(
    name: str, key: str, tensor: Tensor, positions: BlockPositions, index: int
) -> Iterator[tuple[str, str, Tensor, tuple[int, int] | None, Rect | None, int]]:
    """Runs of neighbouring blocks of a stack (B, k, k), which is (B·k, k) of the whole matrix's."""
    size, start = tensor.shape[1], 0
    of, numbers, count = positions.get(key, (key, list(range(len(tensor))), len(tensor)))
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            first = numbers[start]
            rect = Rect(name, Region(first * size, (first + at - start) * size, 0, size))
            yield of, name, tensor[start:at], (count * size, size), rect, index
            start = at


def local_entries(optimizer: Keeper, index: int) -> list[StateEntry]:
    """Everything that this rank keeps of shard group `index`; what several parts have alike, once for each."""
    shard_group = optimizer.shard_groups[index]
    entries = []
    for param_shard in shard_group.param_shards:
        if param_shard.view.param.dtype != torch.float32:
            for rect in param_shard.rects:
                entries.append(
                    _with_region(
                        "fp32_param", rect, rect.run(param_shard.main), shape2d(shard_group.infos[rect.matrix])
                    )
                )
        for key, flat in param_shard.state.items() if optimizer.average is None or optimizer.average.stored else ():
            entries += [
                _with_region(key, rect, rect.run(flat), shape2d(shard_group.infos[rect.matrix]))
                for rect in param_shard.rects
            ]
    for slices in optimizer.element_steps[index].slices.values():
        for part in slices:
            shape = shape2d(shard_group.infos[part.matrix])
            for key, tensor in part.state.items():
                if codes := packed_state.find(part.state, key):
                    entries.append(_with_region(key, part.rect, codes.decode(), shape, codes))
                elif not packed_state.is_scale(part.state, key):
                    entries.append(_with_region(key, part.rect, tensor, shape))
    shared: dict[tuple[str, str], StateEntry] = {}
    for key, name, tensor, whole, region, number in whole_regions(optimizer.matrix_steps[index]):
        if region is not None and whole is not None:
            entries.append(_with_region(key, region, tensor, whole))
        elif (key, name) in shared:  # once a rank: Megatron takes all that a rank has of one entry for its first copy
            shared[key, name].alike.append(tensor.detach())
        else:
            again = 0 if optimizer.matrix_steps[index].placed.counts else shard_group.size
            shared[key, name] = StateEntry(key, name, tensor.detach(), replica=number + again)
    return entries + list(shared.values())


def collect(optimizer: Keeper, index: int) -> list[StateEntry]:
    """As `local_entries`; collective, to number what several ranks hold alike."""
    shard_group, entries = optimizer.shard_groups[index], local_entries(optimizer, index)
    keys_here = [None if entry.rect is None else (entry.key, *entry.rect.key) for entry in entries]
    holders: dict[Any, int] = {}
    for rank, theirs in enumerate(gather_objects(keys_here, shard_group.group, shard_group.size)):
        for number, keys in enumerate(theirs):
            if keys is not None:
                if rank == shard_group.rank:
                    entries[number].replica = holders.get(keys, 0)
                holders[keys] = holders.get(keys, 0) + 1
    for entry in entries:  # the two stages of a tied embedding keep equal state: the second is a replica
        entry.replica += 0 if bool(shard_group.counted[shard_group.order[entry.matrix]]) else shard_group.size
    return entries


def tensors_in_place(optimizer: Keeper) -> Iterator[Tensor]:
    """All that the optimizer keeps between steps, where it lies."""
    for shard_group in optimizer.shard_groups:
        for param_shard in shard_group.param_shards:
            yield param_shard.main
            yield from param_shard.state.values()
    for element in optimizer.element_steps:
        for state_entries in element.slices.values():
            for state_entry in state_entries:
                yield from state_entry.state.values()
    for step in optimizer.matrix_steps:
        for state in (*step.states.values(), *step.shared.values()):
            yield from state.values()


def contents(optimizer: Keeper) -> str:
    """Equal for two runs if and only if they keep the same state: matrices, their optimizers and options."""
    groups = [
        (group.optimizer, sorted((k, str(v)) for k, v in group.options.items()), sorted(i.name for i in group.infos))
        for group in optimizer.groups
    ]
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]


def common_state(optimizer: Keeper) -> dict[str, Any]:
    """What is the same on every rank: step number, skipped matrices, and the groups without their tensors."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizers = sorted({group.optimizer for group in optimizer.groups})
    return {
        "format": FORMAT,
        "step": optimizer.step_number,
        "param_groups": groups,
        "optimizers": optimizers,
        "contents": contents(optimizer),
        "averaged": optimizer.average is not None,
        "numbers": numbers_of(optimizer.group_optimizers),
    }


def numbers_of(group_optimizers: Sequence[Any]) -> list[dict[str, float]]:
    """Numbers of each group's rule, as floats."""
    return [{key: float(value) for key, value in getattr(each, "numbers", {}).items()} for each in group_optimizers]


def sharded_state(optimizer: Keeper) -> dict[str, Any]:
    """Megatron's sharded state dict, to save from and to load into."""
    optimizer.ensure_states()
    optimizer.host.settle()
    if optimizer.average is not None:
        optimizer.average.settle()
    optimizer.stored = [collect(optimizer, index) for index in range(len(optimizer.shard_groups))]
    tensors = {
        state_entry.name: _sharded(state_entry, shard_group)
        for shard_group, state_entries in zip(optimizer.shard_groups, optimizer.stored, strict=True)
        for state_entry in state_entries
    }
    return {**common_state(optimizer), "tensors": tensors}


def _sharded(state_entry: StateEntry, shard_group: ShardGroup) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    entry = f"optimizer.state.{state_entry.key}.{state_entry.matrix}"
    if state_entry.rect is None:
        return ShardedTensor.from_rank_offsets(entry, state_entry.tensor, replica_id=state_entry.replica)
    return ShardedTensor(
        entry,
        state_entry.tensor,
        state_entry.tensor.dtype,
        tuple(state_entry.tensor.shape),
        state_entry.shape,
        (state_entry.rect.region.row0, state_entry.rect.region.col0),
        axis_fragmentations=None,  # no regular grid
        replica_id=state_entry.replica,
        allow_shape_mismatch=shard_group.infos[state_entry.matrix].kind in _PADDED,
    )


def load_state(optimizer: Keeper, state: dict[str, Any]) -> None:
    """Take what `sharded_state` laid out and the checkpoint filled."""
    if state.get("format") != FORMAT:
        raise UserError(
            "the checkpoint's optimizer state was not written by this optimizer; load the model alone by --no-load-optim."
        )
    optimizer.step_number = int(state["step"])
    for state_entry in (state_entry for state_entries in optimizer.stored for state_entry in state_entries):
        state_entry.take(state["tensors"][state_entry.name])
    optimizer.stored = []
    for param_shard in optimizer.param_shards():
        param_shard.publish()
    _restore_groups(optimizer.param_groups, state["param_groups"])
    for each, numbers in zip(optimizer.group_optimizers, state.get("numbers", ())):
        if numbers:
            each.numbers = dict(numbers)
    if optimizer.average is not None:
        optimizer.average.loaded()


def _restore_groups(current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    by_name = {group.get("name"): group for group in saved}
    for group in current:
        for key, value in by_name.get(group["name"], {}).items():
            if key in ("lr", "weight_decay"):
                group[key] = value
