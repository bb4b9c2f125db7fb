"""Optimizer state in checkpoints: by logical matrix and whole-matrix rows, so that any layout loads any other.

Tensors with a matrix's rows (fp32 main copies, element-wise state, momentum) are cut into row chunks on a grid that
depends on the matrix alone; each chunk travels to one rank, which saves it under the matrix's global name. Stacks of
square blocks (factors, bases) are tall matrices to this end; what is left (flags, norms) is saved as it is. Loading is
the same way back. 8-bit state is saved as the fp32 values that its codes stand for, which give the same codes again.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opt.distributed import packed_state
from megatron_opt.distributed.domain import Domain, gather_objects, shape2d
from megatron_opt.distributed.elementwise import ElementwiseStep
from megatron_opt.distributed.exchange import Holdings, Route, find_routes
from megatron_opt.distributed.fragments import Rect
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.parts import Part
from megatron_opt.errors import UserError
from megatron_opt.optimizers.groups import Group

FORMAT = "megatron_opt.1"
CHUNK = 1 << 24  # elements
Kind = tuple[str, str]  # state key, dtype
_PADDED = ("embedding", "output")  # their rows depend on how the vocabulary is padded


class Keeper(Protocol):
    """What is saved of an optimizer, by domain and by group."""

    groups: list[Group]
    param_groups: list[dict[str, Any]]
    domains: list[Domain]
    element_steps: list[ElementwiseStep]
    matrix_steps: list[MatrixStep]
    stored: list[Any]
    step_number: int
    device: torch.device

    def ensure_states(self) -> None: ...

    def fragments(self) -> list[Any]: ...


@dataclass
class Held:
    """What this rank holds of one kind: rectangles and their flat tensors, and the whole shape by matrix."""

    rects: list[Rect] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    codes: list[packed_state.Codes | None] = field(default_factory=list)

    def add(
        self, rect: Rect, tensor: Tensor, shape: tuple[int, int], codes: packed_state.Codes | None = None
    ) -> None:
        self.rects.append(Rect(*rect.place, 0))
        self.tensors.append(tensor.detach().view(-1))
        self.shapes[rect.matrix] = shape
        self.codes.append(codes)


@dataclass
class Laid:
    """One kind of state over a domain, and the chunks of it that this rank saves or loads."""

    key: str
    dtype: torch.dtype
    held: Held
    parts: dict[tuple[str, int], Part]
    route: Route


@dataclass
class Stored:
    """Everything that one domain keeps between steps, and the chunks on their way to or from a checkpoint."""

    laid: list[Laid]
    whole: dict[tuple[str, str], tuple[list[Tensor], int]]  # by state key and matrix: equal tensors; which replica
    slabs: list[dict[tuple[str, int], Tensor]] = field(default_factory=list)


def _chunks(shapes: dict[str, tuple[int, int]], ranks: int) -> list[Part]:
    """The grid: rows of every matrix in chunks, each to the rank with the fewest elements so far."""
    load = [0] * ranks
    parts = []
    for name in sorted(shapes):
        rows, cols = shapes[name]
        height = max(1, CHUNK // cols)
        for index, start in enumerate(range(0, rows, height)):
            stop = min(rows, start + height)
            rank = load.index(min(load))
            load[rank] += (stop - start) * cols
            parts.append(Part(name, index, rank, 0, start, stop, (rows, cols)))
    return parts


def whole_places(step: MatrixStep) -> Iterator[tuple[str, str, Tensor, tuple[int, int] | None, Rect | None, int]]:
    """Every tensor of a matrix step's state: (key, matrix, tensor, whole shape, place, index of its part).

    Tensors with a matrix's rows have their place in it; stacks of square blocks are the rows of one matrix. Others have
    no shape and no place: they are the same at every part.
    """
    for key_of, state in sorted(step.states.items()):
        (name, index), part, info = key_of, step.mine[key_of], step.infos[key_of[0]]
        rule, stacks = step.rules[name], _places(step, key_of)
        common = {*rule.flags}
        if rule.split_dim(info) is not None:
            common |= {*rule.init_shared(info, torch.device("meta"))}
        r0, r1, c0, c1 = part.bounds
        rows, cols = shape2d(info)
        for key, tensor in sorted(state.items()):
            if tensor.dim() == 3 and tensor.shape[1] == tensor.shape[2]:
                yield from _stack(name, key, tensor, stacks, index)
            elif key not in common and tensor.dim() in (1, 2) and tensor.shape[0] == r1 - r0 \
                    and tensor.numel() == (r1 - r0) * (c1 - c0):
                yield key, name, tensor, (rows, cols), Rect(name, r0, r1, c0, c1), index
            elif key not in common and tensor.dim() and tensor.shape[0] == tensor.numel() == r1 - r0:
                yield key, name, tensor, (rows, 1), Rect(name, r0, r1, 0, 1), index
            else:
                yield key, name, tensor, None, None, index
    for (name, index), state in sorted(step.shared.items()):
        stacks = _places(step, (name, index))
        for key, tensor in sorted(state.items()):
            if tensor.dim() == 3 and tensor.shape[1] == tensor.shape[2]:
                yield from _stack(name, key, tensor, stacks, index)
            else:
                yield key, name, tensor, None, None, index


Places = dict[str, tuple[str, list[int], int]]  # by key of a stack: its key in the whole, its blocks' numbers, of how many


def _places(step: MatrixStep, key: tuple[str, int]) -> Places:
    """Where the stacks of a part's cell lie in the matrix's; nothing where the cell is the matrix."""
    cell = step.cells[key]
    return {} if cell.is_whole else step.rules[key[0]].stack_places(step.infos[key[0]], cell.area)


def _stack(
    name: str, key: str, tensor: Tensor, places: Places, index: int
) -> Iterator[tuple[str, str, Tensor, tuple[int, int] | None, Rect | None, int]]:
    """Runs of neighbouring blocks of a stack (B, k, k), which is (B·k, k) of the whole matrix's."""
    size, start = tensor.shape[1], 0
    of, numbers, count = places.get(key, (key, list(range(len(tensor))), len(tensor)))
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            first = numbers[start]
            rect = Rect(name, first * size, (first + at - start) * size, 0, size)
            yield of, name, tensor[start:at], (count * size, size), rect, index
            start = at


def _matrix_kinds(step: MatrixStep, held: dict[Kind, Held]) -> dict[tuple[str, str], tuple[list[Tensor], int]]:
    """Add a matrix step's state that has a place to `held`; return what is saved whole, and which replica it is."""
    whole: dict[tuple[str, str], tuple[list[Tensor], int]] = {}
    for key, name, tensor, shape, rect, index in whole_places(step):
        if rect is None or shape is None:
            same, replica = whole.get((key, name), ([], index))
            whole[key, name] = [*same, tensor], min(replica, index)
        else:
            _of(held, key, tensor).add(rect, tensor, shape)
    return whole


def _of(held: dict[Kind, Held], key: str, tensor: Tensor) -> Held:
    return held.setdefault((key, str(tensor.dtype).removeprefix("torch.")), Held())


def collect(optimizer: Keeper, index: int) -> Stored:
    """Everything that domain `index` keeps; every rank of it gets the same kinds in the same order."""
    domain = optimizer.domains[index]
    held: dict[Kind, Held] = {}
    for fragment in domain.fragments:
        if fragment.view.param.dtype != torch.float32:
            for rect in fragment.rects:
                flat = fragment.main[rect.offset : rect.offset + rect.numel]
                _of(held, "fp32_param", flat).add(rect, flat, shape2d(domain.infos[rect.matrix]))
    for pieces in optimizer.element_steps[index].slices.values():
        for piece in pieces:
            rect, shape = piece.rect, shape2d(domain.infos[piece.matrix])
            for key, tensor in piece.state.items():
                if codes := packed_state.find(piece.state, key):
                    values = codes.decode()
                    _of(held, key, values).add(rect, values, shape, codes)
                elif not packed_state.is_scale(piece.state, key):
                    _of(held, key, tensor).add(rect, tensor, shape)
    whole = _matrix_kinds(optimizer.matrix_steps[index], held)
    everyone = gather_objects({kind: (h.rects, h.shapes) for kind, h in held.items()}, domain.group, domain.size)
    laid = []
    for kind in sorted({kind for ranks in everyone for kind in ranks}):
        shapes: dict[str, tuple[int, int]] = {}
        holdings: list[Holdings] = []
        for ranks in everyone:
            rects, known = ranks.get(kind, ([], {}))
            shapes.update(known)
            holdings.append(list(enumerate(rects)))
        parts = _chunks(shapes, domain.size)
        route = find_routes(holdings, parts, domain.rank, [sorted(shapes)])[0]
        mine = {part.key: part for part in parts if part.rank == domain.rank}
        laid.append(Laid(kind[0], getattr(torch, kind[1]), held.get(kind, Held()), mine, route))
    return Stored(laid, whole)


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
        "format": FORMAT, "step": optimizer.step_number, "param_groups": groups, "optimizers": optimizers,
        "contents": contents(optimizer),
    }


def sharded_state(optimizer: Keeper, is_loading: bool = False) -> dict[str, Any]:
    """Megatron's sharded state dict; on loading, its tensors are room for the saved ones."""
    optimizer.ensure_states()
    tensors: dict[str, Any] = {}
    optimizer.stored = []
    for index, domain in enumerate(optimizer.domains):
        stored = collect(optimizer, index)
        optimizer.stored.append(stored)
        for kind in stored.laid:
            slabs = {
                key: torch.empty(part.slab_shape, dtype=kind.dtype, device=optimizer.device)
                for key, part in kind.parts.items()
            }
            stored.slabs.append(slabs)
            if not is_loading:
                domain.exchange.gather(
                    kind.route, kind.held.tensors, slabs, "state to checkpoint", kind.dtype
                ).finish()
            for (name, number), slab in slabs.items():
                tensors[f"{kind.key}.{name}.{number}"] = _sharded(kind.key, name, number, slab, domain)
        for (key, name), ((tensor, *_), replica) in stored.whole.items():
            # an asynchronous save must not see the next step's changes
            room = tensor if is_loading or tensor.is_cuda else tensor.clone()
            tensors[f"{key}.{name}"] = _sharded(key, name, None, room, domain, replica)
    return {**common_state(optimizer), "tensors": tensors}


def _sharded(
    key: str, matrix: str, number: int | None, tensor: Tensor, domain: Domain, replica: int = 0
) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    entry = f"optimizer.state.{key}.{matrix}" + ("" if number is None else f".{number}")
    # the two stages of a tied embedding keep equal state: the second is a replica
    replica += 0 if bool(domain.counted[domain.order[matrix]]) else domain.size
    padded = domain.infos[matrix].kind in _PADDED and number is not None
    return ShardedTensor.from_rank_offsets(
        entry, tensor.detach(), replica_id=replica, allow_shape_mismatch=padded
    )


def load_state(optimizer: Keeper, state: dict[str, Any]) -> None:
    """Take what `sharded_state` laid out and the checkpoint filled."""
    if state.get("format") != FORMAT:
        raise UserError(
            "the checkpoint's optimizer state was not written by this optimizer; load the model alone by --no-load-optim."
        )
    optimizer.step_number = int(state["step"])
    tensors = state["tensors"]
    for domain, stored in zip(optimizer.domains, optimizer.stored, strict=True):
        for kind in stored.laid:
            slabs = {key: tensors[f"{kind.key}.{key[0]}.{key[1]}"] for key in kind.parts}
            domain.exchange.scatter(
                kind.route, slabs, kind.held.tensors, "state from checkpoint", kind.dtype
            ).finish()
            for values, codes in zip(kind.held.tensors, kind.held.codes, strict=True):
                if codes is not None:
                    codes.encode(values)
        for (key, name), (several, _) in stored.whole.items():
            for tensor in several:
                tensor.copy_(tensors[f"{key}.{name}"])
    optimizer.stored = []
    for fragment in optimizer.fragments():
        fragment.publish()
    _restore_groups(optimizer.param_groups, state["param_groups"])


def _restore_groups(current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    by_name = {group.get("name"): group for group in saved}
    for group in current:
        for key, value in by_name.get(group["name"], {}).items():
            if key in ("lr", "weight_decay"):
                group[key] = value
