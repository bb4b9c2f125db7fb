"""Optimizer state in checkpoints: by logical matrix and whole-matrix rows, so that any layout loads any other.

Tensors with a matrix's rows (fp32 main copies, element-wise state, momentum) are cut into row chunks on a grid that
depends on the matrix alone; each chunk travels to one rank, which saves it under the matrix's global name. Tensors of
other shapes (factors, bases) are whole at their owner and saved as they are. Loading is the same way back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_opt.distributed.domain import Domain, gather_objects, shape2d
from megatron_opt.distributed.exchange import Holdings, Part, Route, find_routes
from megatron_opt.distributed.fragments import Rect
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.errors import UserError

if TYPE_CHECKING:
    from megatron_opt.distributed.sharded_optimizer import ShardedOptimizer

FORMAT = "megatron_opt.1"
CHUNK = 1 << 24  # elements


@dataclass
class Laid:
    """One kind of state over a domain: this rank's flat tensors, and the chunks that it saves or loads."""

    key: str
    flats: list[Tensor]
    parts: dict[tuple[str, int], Part]
    route: Route
    dtype: torch.dtype


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


def _lay(domain: Domain, key: str, dtype: torch.dtype, held: list[tuple[Rect, Tensor]], shapes: dict[str, tuple[int, int]]) -> Laid:
    """Route one kind of state from where it is held to the grid; `held` are flat tensors with the rectangle each covers."""
    mine: Holdings = [
        (index, Rect(r.matrix, r.row0, r.row1, r.col0, r.col1, 0)) for index, (r, _) in enumerate(held)
    ]
    holdings = gather_objects(mine, domain.group, domain.size)
    parts = _chunks(shapes, domain.size)
    route = find_routes(holdings, parts, domain.rank, [sorted(shapes)])[0]
    flats = [tensor for _, tensor in held]
    return Laid(key, flats, {p.key: p for p in parts if p.rank == domain.rank}, route, dtype)


def _row_shape(tensor: Tensor, rows: int, cols: int) -> tuple[int, int] | None:
    """(rows, columns) where a state tensor has the matrix's rows: its own shape, or one number a row."""
    if tuple(tensor.shape) in ((rows, cols), (rows,)) and tensor.numel() == rows * cols:
        return rows, cols
    if tensor.dim() and tensor.shape[0] == rows and tensor.numel() == rows:
        return rows, 1
    return None


def _matrix_kinds(step: MatrixStep) -> tuple[dict[str, list[tuple[Rect, Tensor]]], dict[str, Tensor]]:
    """State of a matrix step on this rank: what is laid on the grid, by state key, and what is saved whole."""
    laid: dict[str, list[tuple[Rect, Tensor]]] = {}
    whole: dict[str, Tensor] = {}
    for (name, index), state in sorted(step.states.items()):
        part, rule, info = step.placed.parts[name, index], step.rules[name], step.infos[name]
        common = set(rule.init_shared(info, torch.device("meta"))) if rule.split_dim(info) is not None else set()
        r0, r1, c0, c1 = part.bounds
        for key, tensor in sorted(state.items()):
            shape = None if key in common else _row_shape(tensor, r1 - r0, c1 - c0)
            if shape is None:
                whole[f"{key}.{name}"] = tensor
            else:
                columns = (c0, c1) if shape[1] == c1 - c0 else (0, 1)
                laid.setdefault(key, []).append((Rect(name, r0, r1, *columns), tensor))
    for name, state in sorted(step.shared.items()):
        whole.update({f"{key}.{name}": tensor for key, tensor in sorted(state.items())})
    return laid, whole


def _kinds(optimizer: "ShardedOptimizer", index: int) -> tuple[list[Laid], dict[str, Tensor]]:
    """Everything that one domain keeps between steps; every rank of it makes the same list of kinds."""
    domain = optimizer.domains[index]
    held: dict[str, list[tuple[Rect, Tensor]]] = {}
    for fragment in domain.fragments:
        if fragment.view.param.dtype != torch.float32:
            for rect in fragment.rects:
                flat = fragment.main[rect.offset : rect.offset + rect.numel]
                held.setdefault("fp32_param", []).append((rect, flat))
    element = optimizer.element_steps[index]
    for pieces in element.slices.values():
        for piece in pieces:
            rect = next(r for r in domain.fragments[piece.fragment].rects if r.offset == piece.offset)
            for key, tensor in piece.state.items():
                held.setdefault(key, []).append((rect, tensor))
    laid, whole = _matrix_kinds(optimizer.matrix_steps[index])
    for key, entries in laid.items():
        held.setdefault(key, []).extend(entries)
    # every rank must know every kind, its type and the matrices that have it
    mine = {
        key: (str(entries[0][1].dtype).removeprefix("torch."), {r.matrix: r.col1 if t.numel() == (r.row1 - r.row0) and r.col1 == 1 else 0 for r, t in entries})
        for key, entries in held.items()
    }
    known: dict[str, tuple[str, dict[str, int]]] = {}
    for other in gather_objects(mine, domain.group, domain.size):
        for key, (dtype, names) in other.items():
            known.setdefault(key, (dtype, {}))[1].update(names)
    kinds = []
    for key in sorted(known):
        dtype, names = known[key]
        shapes = {}
        for name, narrow in names.items():
            rows, cols = shape2d(domain.infos[name])
            shapes[name] = (rows, 1) if narrow == 1 else (rows, cols)
        kinds.append(_lay(domain, key, getattr(torch, dtype), held.get(key, []), shapes))
    return kinds, whole


def common_state(optimizer: "ShardedOptimizer") -> dict[str, Any]:
    """What is the same on every rank: step number, counts, and the groups without their tensors."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {"format": FORMAT, "step": optimizer.step_number, "param_groups": groups}


def sharded_state(optimizer: "ShardedOptimizer") -> dict[str, Any]:
    """Megatron's sharded state dict; on loading, its tensors are filled in place of the saved ones."""
    from megatron.core.dist_checkpointing import ShardedTensor

    optimizer.ensure_states()
    tensors: dict[str, Any] = {}
    optimizer._laid = []  # kept for load_state_dict, which follows
    for index, domain in enumerate(optimizer.domains):
        kinds, whole = _kinds(optimizer, index)
        optimizer._laid.append((kinds, whole))
        for kind in kinds:
            slabs = {
                key: torch.empty(part.slab_shape, dtype=kind.dtype, device=_device(optimizer))
                for key, part in kind.parts.items()
            }
            domain.exchange.gather(kind.route, kind.flats, slabs, "state to checkpoint", kind.dtype).finish()
            for (name, number), slab in slabs.items():
                entry = f"optimizer.state.{kind.key}.{name}.{number}"
                tensors[entry] = _sharded(ShardedTensor, entry, slab, domain, name)
        for name, tensor in whole.items():
            entry = f"optimizer.state.{name}"
            tensors[entry] = _sharded(ShardedTensor, entry, tensor, domain, name.split(".", 1)[1])
    return {**common_state(optimizer), "tensors": tensors}


def _sharded(cls: Any, entry: str, tensor: Tensor, domain: Domain, matrix: str) -> Any:
    # the two stages of a tied embedding keep equal state: the second is a replica
    counted = bool(domain.counted[domain.order[matrix]])
    return cls.from_rank_offsets(entry, tensor.detach(), replica_id=0 if counted else 1)


def _device(optimizer: "ShardedOptimizer") -> torch.device:
    return optimizer._scale_one.device


def load_state(optimizer: "ShardedOptimizer", state: dict[str, Any]) -> None:
    """Take what `sharded_state` laid out and the checkpoint filled."""
    if state.get("format") != FORMAT:
        raise UserError(
            "the checkpoint's optimizer state was not written by this optimizer; load the model alone by --no-load-optim."
        )
    optimizer.step_number = int(state["step"])
    tensors = state["tensors"]
    for domain, (kinds, whole) in zip(optimizer.domains, optimizer._laid, strict=True):
        for kind in kinds:
            slabs = {
                (name, number): tensors[f"optimizer.state.{kind.key}.{name}.{number}"]
                for name, number in kind.parts
            }
            domain.exchange.scatter(kind.route, slabs, kind.flats, "state from checkpoint", kind.dtype).finish()
        for name, tensor in whole.items():
            tensor.copy_(tensors[f"optimizer.state.{name}"])
    optimizer._laid = []
    _restore_groups(optimizer.param_groups, state["param_groups"])


def _restore_groups(current: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    by_name = {group.get("name"): group for group in saved}
    for group in current:
        for key, value in by_name.get(group["name"], {}).items():
            if key in ("lr", "weight_decay"):
                group[key] = value
