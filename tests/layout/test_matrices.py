"""Logical matrices against slicing by hand, with integers: every declared layer kind, every tensor-parallel size."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_opt.distributed.param_shards import rectangles
from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import KINDS as DECLARED
from megatron_opt.layout.kinds import Geometry, find_kind
from megatron_opt.layout.matrices import ParamView, declare, split_param
from megatron_opt.layout.names import canonical_name, global_names

HEADS, GROUPS, D, H = 8, 2, 3, 12
GEOMETRY = Geometry(
    HEADS,
    GROUPS,
    D,
    gated_mlp=True,
    qk_head_dim=4,
    v_head_dim=3,
    kv_lora_rank=10,
    q_lora_rank=6,
    rope_dim=2,
    ssm_inner=16,
    ssm_state=8,
    ssm_heads=8,
)


def numbered(rows: int, cols: int) -> Tensor:
    return torch.arange(rows * cols).view(rows, cols)


def glu_shards(whole: Tensor, tp: int) -> list[Tensor]:
    """Megatron gives every rank its share of the gate above its share of up."""
    gate, up = whole.chunk(2)
    return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]


def qkv_by_hand(whole: Tensor, gate: bool = False) -> dict[str, Tensor]:
    """Group after group: the query heads of the group, their gates where there are such, its key, its value."""
    per = HEADS // GROUPS
    widths = [("q", per * D)] + ([("gate", per * D)] if gate else []) + [("k", D), ("v", D)]
    found: dict[str, list[Tensor]] = {name: [] for name, _ in widths}
    at = 0
    for _ in range(GROUPS):
        for name, width in widths:
            found[name].append(whole[at : at + width])
            at += width
    return {name: torch.cat(parts) for name, parts in found.items()}


def kv_up_by_hand(whole: Tensor) -> dict[str, Tensor]:
    heads = whole.view(HEADS, 7, -1)
    return {"k": heads[:, :4].reshape(HEADS * 4, -1), "v": heads[:, 4:].reshape(HEADS * 3, -1)}


def mamba_parts(whole: Tensor) -> list[Tensor]:
    """z and x of 16, B and C of 8, a step for each of 8 heads; the convolution is over x, B and C."""
    return list(whole.split([16, 16, 8, 8, 8] if len(whole) == 56 else [16, 8, 8]))


def mamba_by_hand(whole: Tensor) -> dict[str, Tensor]:
    names = ("z", "x", "B", "C", "dt") if len(whole) == 56 else ("x", "B", "C")
    found = dict(zip(names, mamba_parts(whole), strict=True))
    return {k: v.reshape(-1, 1) for k, v in found.items()} if whole.shape[1] == 4 else found


L = "decoder.layers.3."
QKV_ROWS = (HEADS + 2 * GROUPS) * D
KINDS = {
    "embedding.word_embeddings.weight": (numbered(16, H), 0, lambda w: {"": w}),
    "embedding.position_embeddings.weight": (numbered(16, H), None, lambda w: {"": w}),
    "embedding.tokentype_embeddings.weight": (numbered(2, H), None, lambda w: {"": w}),
    "output_layer.weight": (numbered(16, H), 0, lambda w: {"": w}),
    L + "self_attention.linear_qkv.weight": (numbered(QKV_ROWS, H), 0, qkv_by_hand),
    L + "self_attention.linear_qkv.bias": (numbered(QKV_ROWS, 1), 0, qkv_by_hand),
    L + "self_attention.linear_proj.weight": (numbered(H, HEADS * D), 1, lambda w: {"": w}),
    L + "self_attention.linear_q_proj.weight": (numbered(HEADS * 4, H), 0, lambda w: {"": w}),
    L + "self_attention.linear_q_down_proj.weight": (numbered(6, H), None, lambda w: {"": w}),
    L + "self_attention.linear_q_up_proj.weight": (numbered(HEADS * 4, 6), 0, lambda w: {"": w}),
    L + "self_attention.linear_kv_down_proj.weight": (
        numbered(12, H), None, lambda w: {"latent": w[:10], "k_rope": w[10:]}),
    L + "self_attention.linear_qkv_down_proj.weight": (
        numbered(18, H), None, lambda w: {"q": w[:6], "latent": w[6:16], "k_rope": w[16:]}),
    L + "self_attention.linear_kv_up_proj.weight": (numbered(HEADS * 7, 10), 0, kv_up_by_hand),
    L + "mlp.linear_fc1.weight": (numbered(32, H), "glu", lambda w: {"gate": w[:16], "up": w[16:]}),
    L + "mlp.linear_fc1.bias": (numbered(32, 1), "glu", lambda w: {"gate": w[:16], "up": w[16:]}),
    L + "mlp.shared_experts.linear_fc1.weight": (numbered(32, H), "glu", lambda w: {"gate": w[:16], "up": w[16:]}),
    L + "mlp.experts.5.linear_fc1.weight": (numbered(32, H), "glu", lambda w: {"gate": w[:16], "up": w[16:]}),
    L + "mlp.linear_fc2.weight": (numbered(H, 16), 1, lambda w: {"": w}),
    L + "mlp.experts.5.linear_fc2.weight": (numbered(H, 16), 1, lambda w: {"": w}),
    L + "mlp.router.weight": (numbered(8, H), None, lambda w: {"": w}),
    L + "mlp.shared_experts.gate_weight": (numbered(1, H), None, lambda w: {"": w}),
    "mtp.layers.0.eh_proj.weight": (numbered(H, 2 * H), 0, lambda w: {"": w}),
    L + "input_layernorm.weight": (numbered(H, 1), None, lambda w: {"": w}),
    L + "self_attention.linear_proj.bias": (numbered(H, 1), None, lambda w: {"": w}),
    L + "mlp.linear_fc2.bias": (numbered(H, 1), None, lambda w: {"": w}),
    L + "mlp.router.bias": (numbered(8, 1), None, lambda w: {"": w}),
    "mtp.layers.0.enorm.weight": (numbered(H, 1), None, lambda w: {"": w}),
    L + "self_attention.core_attention.softmax_offset": (numbered(HEADS, 1), 0, lambda w: {"": w}),
    L + "mixer.in_proj.weight": (numbered(2 * 16 + 2 * 8 + 8, H), "mamba", mamba_by_hand),
    L + "mixer.conv1d_bias": (numbered(16 + 2 * 8, 1), "mamba", mamba_by_hand),
    L + "mixer.conv1d_weight": (numbered(16 + 2 * 8, 4), "mamba", mamba_by_hand),
    L + "mixer.out_proj.weight": (numbered(H, 16), 1, lambda w: {"": w}),
    L + "mixer.A_log": (numbered(8, 1), 0, lambda w: {"": w}),
    L + "mixer.D": (numbered(8, 1), 0, lambda w: {"": w}),
    L + "mixer.dt_bias": (numbered(8, 1), 0, lambda w: {"": w}),
    L + "mixer.norm.weight": (numbered(16, 1), 0, lambda w: {"": w}),
}  # fmt: skip


def shards_of(whole: Tensor, dim: int | str | None, tp: int) -> list[Tensor]:
    if dim == "glu":
        return glu_shards(whole, tp)
    if dim == "mamba":
        return [torch.cat(pieces) for pieces in zip(*(part.chunk(tp) for part in mamba_parts(whole)), strict=True)]
    return [whole] * tp if dim is None else list(whole.chunk(tp, dim))


def assembled(name: str, whole: Tensor, dim: int | str | None, tp: int, geometry: Geometry) -> dict[str, Tensor]:
    """Whole logical matrices from the pieces that every rank declares in its shard; -1 where no rank has a value."""
    found: dict[str, Tensor] = {}
    vector = whole.shape[1] == 1
    for rank, shard in enumerate(shards_of(whole, dim, tp)):
        side = {"glu": 0, "mamba": 0}.get(dim, dim) if tp > 1 else None  # type: ignore[call-overload]
        shape = (shard.shape[0],) if vector else tuple(shard.shape)
        if "conv1d_weight" in name:
            shape, shard = (shape[0], 1, shape[1]), shard.reshape(-1, 1)
        infos, pieces, rows, cols = split_param(name, shape, geometry, tp_rank=rank, tp_size=tp, partition_dim=side)
        assert (rows, cols) == tuple(shard.shape)
        assert sum(piece.rows for piece in pieces) == rows
        for info in infos:
            height, width = (*info.shape, 1)[:2]
            found.setdefault(info.name, torch.full((height, width), -1))
        for piece in pieces:
            block = found[piece.matrix][piece.row : piece.row + piece.rows, piece.col : piece.col + cols]
            block.copy_(shard[piece.local_row : piece.local_row + piece.rows])
    return found


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_what_slicing_by_hand_gives(name: str, tp: int) -> None:
    whole, dim, by_hand = KINDS[name]
    if dim is not None and min(whole.shape[1 if dim == 1 else 0] % tp, 1):
        pytest.skip("the layer does not divide")
    found = assembled(name, whole, dim, tp, GEOMETRY)
    wanted = {f"{name}.{suffix}" if suffix else name: value for suffix, value in by_hand(whole).items()}
    assert sorted(found) == sorted(wanted)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_the_table_above_has_every_declared_layer() -> None:
    used = {find_kind(name) for name in KINDS}
    assert {kind.pattern for kind in DECLARED} == {kind.pattern for kind in used if kind}


@pytest.mark.parametrize("tp", [1, 2, 4])  # 4 is more than there are query groups
def test_gated_attention_and_single_heads(tp: int) -> None:
    name = L + "self_attention.linear_qkv.weight"
    whole = numbered((2 * HEADS + 2 * GROUPS) * D, H)
    geometry = replace(GEOMETRY, output_gate=True)
    wanted = qkv_by_hand(whole, gate=True)
    found = assembled(name, whole, 0, tp, geometry)
    assert {key.rsplit(".", 1)[1] for key in found} == set(wanted)
    for suffix, value in wanted.items():
        assert torch.equal(found[f"{name}.{suffix}"], value)
    per_head = assembled(name, whole, 0, tp, replace(geometry, per_head=True))
    assert len(per_head) == 2 * HEADS + 2 * GROUPS
    for suffix, value in wanted.items():
        for head, rows in enumerate(value.split(D)):
            assert torch.equal(per_head[f"{name}.{suffix}{head}"], rows)


def test_a_shape_that_does_not_fit_the_heads_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit the model's head counts"):
        split_param(
            "x.self_attention.linear_qkv.weight", (QKV_ROWS + 1, H), GEOMETRY, tp_rank=0, tp_size=1, partition_dim=None
        )


@pytest.mark.parametrize("module", ["decoder.layers.0.mixer", "decoder.layers.0.self_attention.linear_new", "x"])
@pytest.mark.parametrize("part", ["weight", "bias", "scale", "layer_norm_gain"])
def test_nothing_is_guessed(module: str, part: str) -> None:
    assert find_kind(f"{module}.{part}") is None


ATTENTION = ("qkv", "q_up_proj", "kv_up_proj", "q_down_proj", "kv_down_proj", "qkv_down_proj")
NORMS = [
    *(f"{L}self_attention.linear_{linear}.layer_norm_{part}" for linear in ATTENTION for part in ("weight", "bias")),
    *(f"{L}mlp.linear_fc1.layer_norm_{part}" for part in ("weight", "bias")),
    *(f"{L}{norm}.weight" for norm in ("input_layernorm", "pre_mlp_layernorm", "mixer.norm", "norm")),
    *(f"{L}self_attention.{norm}.weight" for norm in ("q_layernorm", "k_layernorm", "kv_layernorm")),
    *(f"mtp.layers.0.{norm}.bias" for norm in ("enorm", "hnorm", "final_layernorm")),
    "mtp.layers.0.mtp_model_layer.self_attention.linear_qkv.layer_norm_weight",
    L + "mixer.in_proj.layer_norm_weight",
    "decoder.final_layernorm.weight",
    "decoder.final_norm.weight",
]


@pytest.mark.parametrize("name", NORMS)
def test_norms_alone_and_fused_into_linear_layers_are_norms(name: str) -> None:
    kind = find_kind(canonical_name(name))
    assert kind is not None
    assert kind.kind == "norm"


class _Layer(torch.nn.Module):
    """As Megatron's: its number counts from 1 over the whole model."""

    def __init__(self, number: int, **parts: torch.nn.Module) -> None:
        super().__init__()
        self.layer_number = number
        for name, part in parts.items():
            self.add_module(name, part)


def _experts(grouped: bool) -> torch.nn.Module:
    mlp, experts = torch.nn.Module(), torch.nn.Module()
    experts.num_local_experts = 2  # type: ignore[assignment]
    if grouped:
        experts.linear_fc1 = torch.nn.Module()
        for local in range(2):
            experts.linear_fc1.register_parameter(f"weight{local}", torch.nn.Parameter(torch.zeros(8, 4)))
    else:
        experts.local_experts = torch.nn.ModuleList()
        for _ in range(2):
            one = torch.nn.Module()
            one.linear_fc1 = torch.nn.Linear(4, 8, bias=False)
            experts.local_experts.append(one)
    mlp.experts = experts
    return mlp


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
def test_layers_and_experts_have_global_names(grouped: bool) -> None:
    """The second stage's first layer, the second expert-parallel rank's two experts."""
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([_Layer(5, mlp=_experts(grouped))])
    names = [name for name, _ in global_names(chunk, ep_rank=1)]
    assert names == [f"decoder.layers.4.mlp.experts.{expert}.linear_fc1.weight" for expert in (2, 3)]


def test_parameters_without_a_declaration_stop_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state as ps

    for name in ("expert_model_parallel_rank", "tensor_model_parallel_rank", "expert_tensor_parallel_rank"):
        monkeypatch.setattr(ps, f"get_{name}", lambda: 0)
    monkeypatch.setattr(ps, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SimpleNamespace(
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=D,
        gated_linear_unit=True,
        attention_output_gate=False,
    )
    chunk = torch.nn.Module()
    chunk.mixer = torch.nn.Linear(4, 8, bias=False)
    with pytest.raises(UserError, match=r"mixer\.weight \(8, 4\)\); add their kind to KINDS .* or freeze them"):
        declare([chunk], config)
    chunk.mixer.weight.requires_grad = False
    chunk.gain = torch.nn.Parameter(torch.ones(4))  # a vector is no exception
    with pytest.raises(UserError, match=r"gain \(4,\)\); add their kind"):
        declare([chunk], config)
    chunk.gain.requires_grad = False
    assert not declare([chunk], config).matrices


@given(
    tp=st.sampled_from([1, 2, 4]),
    rank=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
    name=st.sampled_from([name for name, (_, dim, _) in KINDS.items() if dim in (0, 1, "glu")]),
)
def test_rectangles_of_any_interval_hold_the_interval(tp: int, rank: int, cuts: list[int], name: str) -> None:
    whole, dim, by_hand = KINDS[name]
    rank %= tp
    side = {"glu": 0}.get(dim, dim) if tp > 1 else None  # type: ignore[call-overload]
    if whole.shape[1 if dim == 1 else 0] % (2 * tp):
        return
    shard = shards_of(whole, dim, tp)[rank].contiguous()
    vector = name.endswith("bias")
    shape = (shard.shape[0],) if vector else tuple(shard.shape)
    _, pieces, rows, cols = split_param(name, shape, GEOMETRY, tp_rank=rank, tp_size=tp, partition_dim=side)
    view = ParamView(name, shard, rows, cols, pieces, False, side is None)
    matrices = {f"{name}.{suffix}" if suffix else name: value for suffix, value in by_hand(whole).items()}
    edges = sorted({0, shard.numel(), *(cut % (shard.numel() + 1) for cut in cuts)})
    flat = shard.view(-1)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        held = flat[start:stop]
        seen = torch.zeros(stop - start, dtype=torch.int)
        for rect in rectangles(view, start, stop):
            block = rect.region.of(matrices[rect.matrix])
            assert torch.equal(held[rect.offset : rect.offset + rect.numel].view(block.shape), block)
            seen[rect.offset : rect.offset + rect.numel] += 1
        assert bool((seen == 1).all())
