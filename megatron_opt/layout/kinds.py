"""The table of parameter kinds: name, role, the side that tensor parallelism cuts, and how rows fall to logical matrices.

Megatron fuses weights that papers keep apart (q, k and v; gate and up; Mamba's z, x, B, C and dt). A `Kind` says how.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.layout.region import cover_once


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
    ssm_inner: int = 0  # width of Mamba's z and x
    ssm_state: int = 0  # of B and C, all groups together
    ssm_heads: int = 0

    @staticmethod
    def of(config: Any, per_head: bool = False) -> "Geometry":
        """From a Megatron TransformerConfig."""
        get = lambda name: getattr(config, name, 0) or 0  # noqa: E731
        ssm = getattr(config, "is_hybrid_model", False)
        ssm_heads = 0
        if ssm:  # as MambaMixer works it out, expansion 2
            ssm_heads = get("mamba_num_heads") or 2 * config.hidden_size // config.mamba_head_dim
        return Geometry(
            num_heads=config.num_attention_heads,
            num_groups=config.num_query_groups or config.num_attention_heads,
            head_dim=config.kv_channels,
            gated_mlp=bool(config.gated_linear_unit),
            output_gate=bool(get("attention_output_gate")),
            per_head=per_head,
            qk_head_dim=get("qk_head_dim"),
            v_head_dim=get("v_head_dim"),
            kv_lora_rank=get("kv_lora_rank"),
            q_lora_rank=get("q_lora_rank"),
            rope_dim=get("qk_pos_emb_head_dim"),
            ssm_inner=ssm_heads * config.mamba_head_dim if ssm else 0,
            ssm_state=config.mamba_num_groups * config.mamba_state_dim if ssm else 0,
            ssm_heads=ssm_heads,
        )


@dataclass(frozen=True)
class FusedSplit:
    """Rows [start, stop) of a whole fused tensor are rows [row, …) of the logical matrix with this suffix."""

    suffix: str
    start: int
    stop: int
    row: int
    heads: int = 1


Splitter = Callable[[Geometry, int], list[FusedSplit]]


def _qkv(g: Geometry, rows: int) -> list[FusedSplit]:
    """Megatron keeps the query heads, key and value of one group together, group after group."""
    per_group, d = g.num_heads // g.num_groups, g.head_dim
    widths = [("q", per_group * d)] + ([("gate", per_group * d)] if g.output_gate else []) + [("k", d), ("v", d)]
    splits, start = [], 0
    for group in range(g.num_groups):
        for suffix, width in widths:
            heads = width // d
            if g.per_head:
                for head in range(heads):
                    at = start + head * d
                    splits.append(FusedSplit(f"{suffix}{group * heads + head}", at, at + d, 0))
            else:
                # q's natural block is the group of heads that share one key (Adam-mini averages over it)
                splits.append(FusedSplit(suffix, start, start + width, group * width, g.num_groups))
            start += width
    return splits


def _kv_up(g: Geometry, rows: int) -> list[FusedSplit]:
    """MLA: per head, the key without its rotary part, then the value."""
    splits, start = [], 0
    for head in range(g.num_heads):
        for suffix, width in (("k", g.qk_head_dim), ("v", g.v_head_dim)):
            name, row = (f"{suffix}{head}", 0) if g.per_head else (suffix, head * width)
            splits.append(FusedSplit(name, start, start + width, row, 1 if g.per_head else g.num_heads))
            start += width
    return splits


def _in_order(*widths: tuple[str, int]) -> list[FusedSplit]:
    splits, start = [], 0
    for suffix, width in widths:
        splits.append(FusedSplit(suffix, start, start + width, 0))
        start += width
    return splits


def _kv_down(g: Geometry, rows: int) -> list[FusedSplit]:
    return _in_order(("latent", g.kv_lora_rank), ("k_rope", g.rope_dim))


def _qkv_down(g: Geometry, rows: int) -> list[FusedSplit]:
    return _in_order(("q", g.q_lora_rank), ("latent", g.kv_lora_rank), ("k_rope", g.rope_dim))


def _whole(g: Geometry, rows: int) -> list[FusedSplit]:
    return [FusedSplit("", 0, rows, 0)]


def _gate_up(g: Geometry, rows: int) -> list[FusedSplit]:
    return _in_order(("gate", rows // 2), ("up", rows // 2)) if g.gated_mlp else _whole(g, rows)


def _mamba_in(g: Geometry, rows: int) -> list[FusedSplit]:
    """Mamba 2's input projection: gate z, input x, input and output matrices B and C, step dt."""
    return _in_order(
        ("z", g.ssm_inner), ("x", g.ssm_inner), ("B", g.ssm_state), ("C", g.ssm_state), ("dt", g.ssm_heads)
    )


def _mamba_conv(g: Geometry, rows: int) -> list[FusedSplit]:
    return _in_order(("x", g.ssm_inner), ("B", g.ssm_state), ("C", g.ssm_state))


@dataclass(frozen=True)
class Kind:
    """How one kind of parameter is named, what it is, which side is cut, and how its rows are split.

    `stacked`: a rank holds its share of every part, one above the other, not a range of the whole's rows. `flat`: not
    a matrix whatever its shape, each element for itself. `maybe_whole`: some layers replicate what others cut.
    """

    pattern: str
    kind: str
    role: str = ""
    cut: int | None = None
    split: Splitter = _whole
    stacked: bool = False
    flat: bool = False
    maybe_whole: bool = False


_MLP = r"mlp\.(?:shared_experts\.|experts\.\d+\.)?"
_NORMS = r"(?:\w+_)?(?:layernorm|norm)|[eh]norm"
KINDS = (
    Kind(r"embedding\.word_embeddings\.weight", "embedding", "word", 0),
    Kind(r"embedding\.position_embeddings\.weight", "embedding", "position"),
    Kind(r"embedding\.tokentype_embeddings\.weight", "embedding", "tokentype"),
    Kind(r"output_layer\.weight", "output", "output", 0),
    Kind(r"(?:self|cross)_attention\.linear_qkv\.weight", "hidden", "", 0, _qkv),
    Kind(r"(?:self|cross)_attention\.linear_qkv\.bias", "bias", "", 0, _qkv),
    Kind(r"(?:self|cross)_attention\.linear_proj\.weight", "hidden", "attention_output", 1),
    Kind(r"(?:self|cross)_attention\.linear_proj\.bias", "bias"),
    Kind(r"self_attention\.core_attention\.softmax_offset", "bias", "softmax_offset", 0),
    Kind(r"self_attention\.linear_q_proj\.weight", "hidden", "q", 0),
    Kind(r"self_attention\.linear_q_down_proj\.weight", "hidden", "q_down", 0, maybe_whole=True),
    Kind(r"self_attention\.linear_q_up_proj\.weight", "hidden", "q", 0),
    Kind(r"self_attention\.linear_kv_down_proj\.weight", "hidden", "kv_down", 0, _kv_down, maybe_whole=True),
    Kind(r"self_attention\.linear_qkv_down_proj\.weight", "hidden", "qkv_down", 0, _qkv_down, maybe_whole=True),
    Kind(r"self_attention\.linear_kv_up_proj\.weight", "hidden", "kv_up", 0, _kv_up),
    Kind(_MLP + r"linear_fc1\.weight", "hidden", "up", 0, _gate_up, stacked=True),
    Kind(_MLP + r"linear_fc1\.bias", "bias", "", 0, _gate_up, stacked=True),
    Kind(_MLP + r"linear_fc2\.weight", "hidden", "down", 1),
    Kind(_MLP + r"linear_fc2\.bias", "bias"),
    Kind(r"mlp\.router\.weight", "router", "router"),
    Kind(r"mlp\.router\.bias", "bias"),
    Kind(r"mlp\.shared_experts\.gate_weight", "router", "shared_gate"),
    Kind(r"eh_proj\.weight", "hidden", "eh_proj", 0),
    Kind(r"mixer\.in_proj\.weight", "hidden", "", 0, _mamba_in, stacked=True),
    Kind(r"mixer\.out_proj\.weight", "hidden", "ssm_output", 1),
    Kind(r"mixer\.conv1d_weight", "ssm", "conv", 0, _mamba_conv, stacked=True, flat=True),
    Kind(r"mixer\.conv1d_bias", "ssm", "conv_bias", 0, _mamba_conv, stacked=True, flat=True),
    Kind(r"mixer\.A_log", "ssm", "A_log", 0),
    Kind(r"mixer\.D", "ssm", "D", 0),
    Kind(r"mixer\.dt_bias", "ssm", "dt_bias", 0),
    Kind(r"mixer\.norm\.weight", "norm", "", 0),
    Kind(rf"(?:{_NORMS})\.(?:weight|bias)", "norm"),
)
_COMPILED = [(re.compile(rf"(?:.*\.)?(?:{kind.pattern})"), kind) for kind in KINDS]


def find_kind(name: str) -> Kind | None:
    """The declaration of a parameter by its canonical name, or None: nothing is guessed from a shape."""
    for pattern, kind in _COMPILED:
        if pattern.fullmatch(name):
            return kind
    return None


def splits_of(kind: Kind, name: str, geometry: Geometry, rows: int) -> list[FusedSplit]:
    """The parts of a whole parameter of `rows` rows; they cover it, and every logical matrix, exactly once.

    Raises UserError where the shape does not fit what the model's geometry says.
    """
    splits = kind.split(geometry, rows)
    spans: dict[str, list[tuple[int, int]]] = {}
    for split in splits:
        spans.setdefault(split.suffix, []).append((split.row, split.row + split.stop - split.start))
    whole = cover_once([(split.start, split.stop) for split in splits], rows)
    if not whole or not all(cover_once(mine, max(stop for _, stop in mine)) for mine in spans.values()):
        covered = sum(split.stop - split.start for split in splits)
        raise UserError(
            f"{name}: {covered} of {rows} rows are declared; its shape does not fit the model's head counts, so this "
            "kind of layer is not known here."
        )
    return splits
