"""Logical matrices: how Megatron's fused and sharded parameters map to the weights that papers write about.

A parameter is a local (r, c) tensor. Its rows belong to one or more logical matrices (q, k and v; gate and up), and a
tensor-parallel shard is a range of rows or columns of them. The declaration per layer kind is the table `LAYERS`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import MatrixInfo


@dataclass(frozen=True)
class Piece:
    """Rows [local_row, local_row + rows) of a local parameter are rows [row, row + rows) of a matrix, from column `col`."""

    matrix: str
    local_row: int
    rows: int
    row: int
    col: int


@dataclass
class ParamView:
    """A local parameter and the pieces of logical matrices in it; `replicas` ranks of its group hold the same shard."""

    name: str  # global name of the Megatron parameter
    param: Tensor
    rows: int
    cols: int
    pieces: list[Piece]
    is_expert: bool
    tp_replicated: bool
    counts: bool = True  # False for the second copy of a tied embedding: its gradient is counted with the first
    chunk: int = 0


@dataclass
class Declaration:
    """All trainable parameters of this rank and the logical matrices that they hold pieces of."""

    views: list[ParamView] = field(default_factory=list)
    matrices: dict[str, MatrixInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """The shapes that decide how fused tensors are cut; everything per whole model, nothing per rank."""

    num_heads: int
    num_groups: int
    head_dim: int
    gated_mlp: bool = False
    output_gate: bool = False
    per_head: bool = False
    qk_head_dim: int = 0
    v_head_dim: int = 0
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    rope_dim: int = 0

    @staticmethod
    def of(config: Any, per_head: bool = False) -> "Geometry":
        """From a Megatron TransformerConfig."""
        return Geometry(
            num_heads=config.num_attention_heads,
            num_groups=config.num_query_groups or config.num_attention_heads,
            head_dim=config.kv_channels,
            gated_mlp=bool(config.gated_linear_unit),
            output_gate=bool(getattr(config, "attention_output_gate", False)),
            per_head=per_head,
            qk_head_dim=getattr(config, "qk_head_dim", 0) or 0,
            v_head_dim=getattr(config, "v_head_dim", 0) or 0,
            kv_lora_rank=getattr(config, "kv_lora_rank", 0) or 0,
            q_lora_rank=getattr(config, "q_lora_rank", 0) or 0,
            rope_dim=getattr(config, "qk_pos_emb_head_dim", 0) or 0,
        )


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a whole fused tensor are rows [row, …) of the logical matrix with this suffix."""

    suffix: str
    start: int
    stop: int
    row: int
    heads: int = 1


Splitter = Callable[[Geometry, int], list[Part]]


def _qkv(g: Geometry, rows: int) -> list[Part]:
    """Megatron keeps the query heads, key and value of one group together, group after group."""
    per_group, d = g.num_heads // g.num_groups, g.head_dim
    widths = [("q", per_group * d)] + ([("gate", per_group * d)] if g.output_gate else []) + [("k", d), ("v", d)]
    parts, start = [], 0
    for group in range(g.num_groups):
        for suffix, width in widths:
            heads = width // d
            if g.per_head:
                for head in range(heads):
                    at = start + head * d
                    parts.append(Part(f"{suffix}{group * heads + head}", at, at + d, 0))
            else:
                # q's natural block is the group of heads that share one key (Adam-mini averages over it)
                parts.append(Part(suffix, start, start + width, group * width, g.num_groups))
            start += width
    return parts


def _kv_up(g: Geometry, rows: int) -> list[Part]:
    """MLA: per head, the key without its rotary part, then the value."""
    parts, start = [], 0
    for head in range(g.num_heads):
        for suffix, width in (("k", g.qk_head_dim), ("v", g.v_head_dim)):
            name, row = (f"{suffix}{head}", 0) if g.per_head else (suffix, head * width)
            parts.append(Part(name, start, start + width, row, 1 if g.per_head else g.num_heads))
            start += width
    return parts


def _stacked(*widths: tuple[str, int]) -> list[Part]:
    parts, start = [], 0
    for suffix, width in widths:
        parts.append(Part(suffix, start, start + width, 0))
        start += width
    return parts


def _kv_down(g: Geometry, rows: int) -> list[Part]:
    return _stacked(("latent", g.kv_lora_rank), ("k_rope", g.rope_dim))


def _qkv_down(g: Geometry, rows: int) -> list[Part]:
    return _stacked(("q", g.q_lora_rank), ("latent", g.kv_lora_rank), ("k_rope", g.rope_dim))


def _whole(g: Geometry, rows: int) -> list[Part]:
    return [Part("", 0, rows, 0)]


@dataclass(frozen=True)
class Layer:
    """How one kind of parameter is named, what it is, and how its rows are cut."""

    pattern: str
    kind: str
    role: str = ""
    split: Splitter = _whole
    glu: bool = False


LAYERS = (
    Layer(r"embedding\.word_embeddings\.weight", "embedding", "word"),
    Layer(r"embedding\.position_embeddings\.weight", "embedding", "position"),
    Layer(r"embedding\.tokentype_embeddings\.weight", "embedding", "tokentype"),
    Layer(r"output_layer\.weight", "output", "output"),
    Layer(r"(self|cross)_attention\.linear_qkv\.weight", "hidden", "", _qkv),
    Layer(r"(self|cross)_attention\.linear_qkv\.bias", "bias", "", _qkv),
    Layer(r"(self|cross)_attention\.linear_proj\.weight", "hidden", "attention_output"),
    Layer(r"self_attention\.linear_q_proj\.weight", "hidden", "q"),
    Layer(r"self_attention\.linear_q_down_proj\.weight", "hidden", "q_down"),
    Layer(r"self_attention\.linear_q_up_proj\.weight", "hidden", "q"),
    Layer(r"self_attention\.linear_kv_down_proj\.weight", "hidden", "kv_down", _kv_down),
    Layer(r"self_attention\.linear_qkv_down_proj\.weight", "hidden", "qkv_down", _qkv_down),
    Layer(r"self_attention\.linear_kv_up_proj\.weight", "hidden", "kv_up", _kv_up),
    Layer(r"mlp\.(shared_experts\.|experts\.\d+\.)?linear_fc1\.weight", "hidden", "up", glu=True),
    Layer(r"mlp\.(shared_experts\.|experts\.\d+\.)?linear_fc1\.bias", "bias", "", glu=True),
    Layer(r"mlp\.(shared_experts\.|experts\.\d+\.)?linear_fc2\.weight", "hidden", "down"),
    Layer(r"mlp\.router\.weight", "router", "router"),
    Layer(r"mlp\.shared_experts\.gate_weight", "router", "shared_gate"),
    Layer(r"eh_proj\.weight", "hidden", "eh_proj"),
    Layer(r"(self|cross)_attention\.linear_proj\.bias", "bias"),
    Layer(r"mlp\.(shared_experts\.|experts\.\d+\.)?linear_fc2\.bias", "bias"),
    Layer(r"mlp\.router\.bias", "bias"),
    Layer(r"(\w+_)?(layernorm|norm)\.(weight|bias)", "norm"),
    Layer(r"[eh]norm\.(weight|bias)", "norm"),  # of multi-token prediction
    # Transformer Engine keeps a norm in the linear layer that it stands before
    Layer(r"self_attention\.linear_(qkv|q_up_proj|kv_up_proj|qkv_down_proj)\.layer_norm_(weight|bias)", "norm"),
    Layer(r"self_attention\.linear_(q|kv)_down_proj\.layer_norm_(weight|bias)", "norm"),
    Layer(r"mlp\.(shared_experts\.)?linear_fc1\.layer_norm_(weight|bias)", "norm"),
    Layer(r"mixer\.in_proj\.layer_norm_(weight|bias)", "norm"),
)


def find_layer(name: str) -> Layer | None:
    """The declaration of a parameter by its global name, or None: nothing is guessed from a shape."""
    for layer in LAYERS:
        if re.fullmatch(rf"(.*\.)?{layer.pattern}", name):
            return layer
    return None


def split_param(
    name: str,
    shape: tuple[int, ...],
    geometry: Geometry,
    *,
    tp_rank: int,
    tp_size: int,
    partition_dim: int | None,
) -> tuple[list[MatrixInfo], list[Piece], int, int]:
    """Logical matrices and pieces of one local parameter of `shape`; also its (r, c).

    `partition_dim` is the side that tensor parallelism cuts, or None where every rank holds the whole.
    """
    layer = find_layer(name)
    if layer is None:
        raise LookupError(name)
    rows = shape[0]
    cols = math.prod(shape[1:])
    row_shards = tp_size if partition_dim == 0 else 1
    col_shards = tp_size if partition_dim == 1 else 1
    all_rows, all_cols = rows * row_shards, cols * col_shards
    col = tp_rank * cols if col_shards > 1 else 0
    shard = tp_rank if row_shards > 1 else 0
    one_dim = len(shape) == 1

    def info(suffix: str, role: str, height: int, heads: int) -> MatrixInfo:
        full = f"{name}.{suffix}" if suffix else name
        return MatrixInfo(full, (height,) if one_dim else (height, all_cols), layer.kind, role or layer.role, heads)

    if layer.glu and geometry.gated_mlp:  # every rank holds its share of gate above its share of up
        half = rows // 2
        infos = [info(suffix, suffix, all_rows // 2, 1) for suffix in ("gate", "up")]
        pieces = [Piece(infos[i].name, i * half, half, shard * half, col) for i in range(2)]
        return infos, pieces, rows, cols
    first, last = shard * rows, (shard + 1) * rows
    heights: dict[str, tuple[int, int]] = {}
    pieces = []
    for part in layer.split(geometry, all_rows):
        height, _ = heights.get(part.suffix, (0, 1))
        heights[part.suffix] = (max(height, part.row + part.stop - part.start), part.heads)
        start, stop = max(part.start, first), min(part.stop, last)
        if start < stop:
            full = f"{name}.{part.suffix}" if part.suffix else name
            pieces.append(Piece(full, start - first, stop - start, part.row + start - part.start, col))
    infos = [info(suffix, re.sub(r"\d+$", "", suffix), height, heads) for suffix, (height, heads) in heights.items()]
    covered = sum(piece.rows for piece in pieces)
    if covered != rows:
        raise ValueError(
            f"{name}: {covered} of {rows} rows are declared; its shape does not fit the model's head counts"
        )
    return infos, _joined(pieces), rows, cols


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours that continue each other become one piece."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if (
            last
            and last.matrix == piece.matrix
            and last.local_row + last.rows == piece.local_row
            and last.row + last.rows == piece.row
        ):
            joined[-1] = replace(last, rows=last.rows + piece.rows)
        else:
            joined.append(piece)
    return joined


def global_names(module: Any, ep_rank: int) -> Iterator[tuple[str, Any]]:
    """Parameters of a model chunk under names that do not depend on the layout: global layers, global experts."""
    layer_numbers = {
        f"{name}.": sub.layer_number - 1
        for name, sub in module.named_modules()
        if re.search(r"layers\.\d+$", name) and hasattr(sub, "layer_number")
    }
    local_experts = {
        f"{name}.": sub.num_local_experts
        for name, sub in module.named_modules()
        if hasattr(sub, "num_local_experts") and name.endswith("experts")
    }
    for local, param in module.named_parameters():
        name = local
        for prefix, number in local_experts.items():
            if not name.startswith(prefix):
                continue
            rest = name[len(prefix) :]
            if match := re.match(r"local_experts\.(\d+)\.(.*)", rest):  # one module an expert
                name = f"{prefix}{ep_rank * number + int(match[1])}.{match[2]}"
            elif match := re.match(r"(.*\.(?:weight|bias))(\d+)$", rest):  # grouped: one tensor an expert
                name = f"{prefix}{ep_rank * number + int(match[2])}.{match[1]}"
        for prefix, number in layer_numbers.items():
            if local.startswith(prefix) and ".mtp" not in prefix and not prefix.startswith("mtp"):
                name = re.sub(r"layers\.\d+\.$", f"layers.{number}.", prefix) + name[len(prefix) :]
        if getattr(param, "shared_embedding", False):  # the last stage's copy of a tied embedding
            name = "embedding.word_embeddings.weight"
        yield name, param


def declare(chunks: Iterable[Any], config: Any, *, per_head: bool = False) -> Declaration:
    """Declare every trainable parameter of this rank's (unwrapped) model chunks; unknown matrices are refused."""
    from megatron.core import parallel_state as ps

    geometry = Geometry.of(config, per_head)
    ep_rank = ps.get_expert_model_parallel_rank()
    found, unknown = Declaration(), []
    for chunk_index, chunk in enumerate(chunks):
        for name, param in global_names(chunk, ep_rank):
            if not param.requires_grad:
                continue
            is_expert = not getattr(param, "allreduce", True)
            sharded = bool(getattr(param, "tensor_model_parallel", False))
            if is_expert:
                size, rank = ps.get_expert_tensor_parallel_world_size(), ps.get_expert_tensor_parallel_rank()
                sharded = sharded or (size > 1 and getattr(param, "partition_dim", -1) >= 0)
            else:
                size, rank = ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank()
            dim = param.partition_dim if sharded and size > 1 else None
            try:
                infos, pieces, rows, cols = split_param(
                    name, tuple(param.shape), geometry, tp_rank=rank, tp_size=size, partition_dim=dim
                )
            except LookupError:
                unknown.append(f"{name} {tuple(param.shape)}")
                continue
            found.matrices.update({info.name: info for info in infos})
            found.views.append(
                ParamView(
                    name,
                    param,
                    rows,
                    cols,
                    pieces,
                    is_expert,
                    dim is None,
                    counts=not getattr(param, "shared", False),
                    chunk=chunk_index,
                )
            )
    if unknown:
        raise UserError(
            f"{len(unknown)} parameters have no declaration ({', '.join(unknown[:5])}); "
            "add their kind to LAYERS in megatron_opt/distributed/matrices.py, or freeze them."
        )
    return found
