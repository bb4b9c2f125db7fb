"""Which rows of which logical matrices make an attention head's query and key."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_opt.layout.kinds import Geometry


@dataclass(frozen=True)
class HeadRows:
    """Rows [start, stop) of a logical matrix that belong to a key's group of query heads.

    `part`: `q`, `k`, or `q_rope`, the part of a latent query that meets the rotary key that all heads share.
    """

    matrix: str
    start: int
    stop: int
    group: int
    part: str


def head_rows(attention: str, params: Iterable[str], geometry: Geometry) -> list[HeadRows]:
    """Of the attention with this global name and these parameters of its (`linear_qkv.weight`, …); empty for another kind.

    Latent attention has one group a head: its keys without position are the head's own. Its rotary key is no row of these.
    """
    rows: list[HeadRows] = []
    for param in params:
        whole, g = f"{attention}.{param}", geometry
        if param in ("linear_qkv.weight", "linear_qkv.bias"):
            per_group, d = g.num_heads // g.num_groups, g.head_dim
            for group in range(g.num_groups):
                for part, heads in (("q", per_group), ("k", 1)):
                    rows += _rows(f"{whole}.{part}", group, range(group * heads, (group + 1) * heads), d, g, part)
        elif param in ("linear_q_proj.weight", "linear_q_up_proj.weight"):
            width = g.qk_head_dim + g.rope_dim
            for head in range(g.num_heads):
                middle = head * width + g.qk_head_dim
                rows.append(HeadRows(whole, head * width, middle, head, "q"))
                rows.append(HeadRows(whole, middle, (head + 1) * width, head, "q_rope"))
        elif param == "linear_kv_up_proj.weight":
            for head in range(g.num_heads):
                rows += _rows(f"{whole}.k", head, range(head, head + 1), g.qk_head_dim, g, "k")
    return rows


def _rows(matrix: str, group: int, heads: range, width: int, geometry: Geometry, part: str) -> list[HeadRows]:
    """Neighbouring heads of a matrix, or of one matrix a head."""
    if geometry.per_head:
        return [HeadRows(f"{matrix}{head}", 0, width, group, part) for head in heads]
    return [HeadRows(matrix, heads.start * width, heads.stop * width, group, part)]
