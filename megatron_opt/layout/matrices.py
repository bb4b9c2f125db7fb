"""Logical matrices: how Megatron's fused and sharded parameters map to the weights that papers write about.

A parameter is a local (r, c) tensor. Its rows belong to one or more logical matrices (q, k and v; gate and up), and a
tensor-parallel shard is a range of rows or columns of them. `kinds.KINDS` declares each kind of layer.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import Geometry, Kind, find_kind, splits_of
from megatron_opt.layout.names import global_names
from megatron_opt.layout.region import cover_once
from megatron_opt.optimizers.base import MatrixInfo


@dataclass(frozen=True)
class RegionMapping:
    """Rows [local_row, local_row + rows) of a local parameter are rows [row, row + rows) of a matrix, from column `col`."""

    matrix: str
    local_row: int
    rows: int
    row: int
    col: int


@dataclass
class ParamView:
    """A local parameter and the mappings of its rows to logical matrices; `replicas` ranks of its group hold the same shard."""

    name: str  # global and canonical
    param: Tensor
    rows: int
    cols: int
    mappings: list[RegionMapping]
    is_expert: bool
    tp_replicated: bool
    counts: bool = True  # False for the second copy of a tied embedding: its gradient is counted with the first
    chunk: int = 0


@dataclass
class Declaration:
    """All trainable parameters of this rank and the logical matrices that they hold regions of."""

    views: list[ParamView] = field(default_factory=list)
    matrices: dict[str, MatrixInfo] = field(default_factory=dict)


def split_param(
    name: str,
    shape: tuple[int, ...],
    geometry: Geometry,
    *,
    tp_rank: int,
    tp_size: int,
    partition_dim: int | None,
) -> tuple[list[MatrixInfo], list[RegionMapping], int, int]:
    """Logical matrices and region mappings of one local parameter of `shape`; also its (r, c).

    `partition_dim` is the side that tensor parallelism cuts, or None where every rank holds the whole. The mappings cover
    the local parameter, and those of all ranks every matrix, exactly once. Raises LookupError for an unknown kind and
    UserError for a shape that does not fit the model's geometry.
    """
    kind = find_kind(name)
    if kind is None:
        raise LookupError(name)
    width = 1 if kind.flat else math.prod(shape[1:])
    each = math.prod(shape[1:]) if kind.flat else 1  # local rows of a flat parameter for one row of its tensor
    row_shards = tp_size if partition_dim == 0 else 1
    col_shards = tp_size if partition_dim == 1 else 1
    rows, all_rows, all_cols = shape[0] * each, shape[0] * row_shards, width * col_shards
    col = tp_rank * width if col_shards > 1 else 0
    shard = tp_rank if row_shards > 1 else 0
    splits = splits_of(kind, name, geometry, all_rows)
    one_dim = kind.flat or len(shape) == 1
    infos: dict[str, MatrixInfo] = {}
    mappings, local = [], 0
    for split in splits:
        info = _info(kind, name, split.suffix, one_dim, all_cols, split.heads)
        height = (split.row + split.stop - split.start) * each
        if known := infos.get(info.name):
            height = max(height, known.shape[0])
        infos[info.name] = replace(info, shape=(height, *info.shape[1:]))
        if kind.stacked:  # every rank holds its share of each part, one above the other
            share = (split.stop - split.start) * each // row_shards
            mappings.append(RegionMapping(info.name, local, share, split.row * each + shard * share, col))
            local += share
            continue
        start, stop = max(split.start * each, shard * rows), min(split.stop * each, (shard + 1) * rows)
        if start < stop:
            row = split.row * each + start - split.start * each
            mappings.append(RegionMapping(info.name, start - shard * rows, stop - start, row, col))
    if not cover_once([(mapping.local_row, mapping.local_row + mapping.rows) for mapping in mappings], rows):
        raise UserError(f"{name}: {tp_size} tensor-parallel ranks do not cut it into equal shares of its matrices.")
    return list(infos.values()), _joined(mappings), rows, width


def _info(kind: Kind, name: str, suffix: str, one_dim: bool, cols: int, heads: int) -> MatrixInfo:
    full = f"{name}.{suffix}" if suffix else name
    role = kind.role if kind.kind == "ssm" else re.sub(r"\d+$", "", suffix) or kind.role
    return MatrixInfo(full, (0,) if one_dim else (0, cols), kind.kind, role, heads)


def _joined(mappings: Iterable[RegionMapping]) -> list[RegionMapping]:
    """Neighbours that continue each other become one mapping."""
    joined: list[RegionMapping] = []
    for mapping in mappings:
        last = joined[-1] if joined else None
        if (
            last
            and last.matrix == mapping.matrix
            and last.local_row + last.rows == mapping.local_row
            and last.row + last.rows == mapping.row
        ):
            joined[-1] = replace(last, rows=last.rows + mapping.rows)
        else:
            joined.append(mapping)
    return joined


def cut_side(name: str, param: Any, is_expert: bool, shards: int) -> int | None:
    """The side of a parameter that tensor parallelism cuts into `shards`, by the table; None where each rank has the whole.

    Raises UserError where Megatron has cut it otherwise.
    """
    kind = find_kind(name)
    if kind is None:
        raise LookupError(name)
    if shards == 1:
        return None
    marked = bool(getattr(param, "tensor_model_parallel", False))
    marked = marked or (is_expert and getattr(param, "partition_dim", -1) >= 0)
    side = param.partition_dim if marked else None
    if side == kind.cut or (side is None and kind.maybe_whole):
        return side
    if side is None and kind.role == "softmax_offset":  # Megatron cuts it by heads without marking it
        return kind.cut
    raise UserError(
        f"{name} is cut along side {side} by Megatron and along {kind.cut} by the table of this project; its kind in "
        "megatron_opt/layout/kinds.py does not fit this Megatron."
    )


def declare(chunks: Iterable[Any], config: Any, *, per_head: bool = False) -> Declaration:
    """Declare every trainable parameter of this rank's (unwrapped) model chunks; unknown ones are refused."""
    from megatron.core import parallel_state as ps

    geometry = Geometry.of(config, per_head)
    ep_rank = ps.get_expert_model_parallel_rank()
    declaration, unknown = Declaration(), []
    for chunk_index, chunk in enumerate(chunks):
        for name, param in global_names(chunk, ep_rank):
            if not param.requires_grad:
                continue
            is_expert = not getattr(param, "allreduce", True)
            if is_expert:
                size, rank = ps.get_expert_tensor_parallel_world_size(), ps.get_expert_tensor_parallel_rank()
            else:
                size, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
            try:
                dim = cut_side(name, param, is_expert, size)
                infos, mappings, rows, cols = split_param(
                    name, tuple(param.shape), geometry, tp_rank=rank, tp_size=size, partition_dim=dim
                )
            except LookupError:
                unknown.append(f"{name} {tuple(param.shape)}")
                continue
            declaration.matrices.update({info.name: info for info in infos})
            declaration.views.append(
                ParamView(
                    name,
                    param,
                    rows,
                    cols,
                    mappings,
                    is_expert,
                    dim is None,
                    counts=not getattr(param, "shared", False),
                    chunk=chunk_index,
                )
            )
    if unknown:
        raise UserError(
            f"{len(unknown)} parameters have no declaration ({', '.join(unknown[:5])}); "
            "add their kind to KINDS in megatron_opt/layout/kinds.py, or freeze them."
        )
    return declaration
