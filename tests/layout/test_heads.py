"""Rows of heads: every query and key row belongs to one head, in the matrices that the table of kinds makes."""

import pytest

from megatron_opt.layout.heads import head_rows
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.matrices import split_param
from megatron_opt.layout.region import cover_once

LATENT = {"qk_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 16, "q_lora_rank": 24, "rope_dim": 4}
CASES = {
    "heads": (Geometry(4, 4, 8), {"linear_qkv.weight": (96, 32)}),
    "groups": (Geometry(6, 2, 8), {"linear_qkv.weight": (80, 32), "linear_qkv.bias": (80,)}),
    "gate": (Geometry(6, 2, 8, output_gate=True), {"linear_qkv.weight": (128, 32)}),
    "per head": (Geometry(6, 2, 8, per_head=True), {"linear_qkv.weight": (80, 32)}),
    "latent": (Geometry(4, 4, 8, **LATENT), {"linear_q_proj.weight": (48, 32), "linear_kv_up_proj.weight": (80, 16)}),
    "latent, q too": (
        Geometry(4, 4, 8, per_head=True, **LATENT),
        {"linear_q_up_proj.weight": (48, 24), "linear_kv_up_proj.weight": (80, 16)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_cover_queries_and_keys_once(name):
    geometry, params = CASES[name]
    prefix, sizes = "decoder.layers.1.self_attention", {}
    for param, shape in params.items():
        infos, *_ = split_param(f"{prefix}.{param}", shape, geometry, tp_rank=0, tp_size=1, partition_dim=0)
        sizes |= {info.name: info.shape[0] for info in infos if info.role in ("q", "k")}
    rows = head_rows(prefix, params, geometry)
    spans = {matrix: [(r.start, r.stop) for r in rows if r.matrix == matrix] for matrix in {r.matrix for r in rows}}
    assert spans.keys() == sizes.keys()
    assert all(cover_once(spans[matrix], size) for matrix, size in sizes.items())
    groups = geometry.num_heads if "latent" in name else geometry.num_groups
    for part in ("q", "k"):
        assert {r.group for r in rows if r.part == part} == set(range(groups))
    assert ("q_rope" in {r.part for r in rows}) == ("latent" in name)
    for r in rows:
        if r.part == "q" and name == "groups":
            assert (r.start, r.stop) == (r.group * 24, r.group * 24 + 24)


def test_another_attention_has_none():
    assert head_rows("decoder.layers.0.mixer", ["in_proj.weight"], Geometry(4, 4, 8)) == []
