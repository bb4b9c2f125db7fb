"""The description of a model by its flags is Megatron's own model: names, shapes, cut sides, order and counts."""

from typing import Any

import pytest
import torch

from megatron_opt import platform
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.model import Model
from megatron_opt.distributed import meta_model
from megatron_opt.errors import UserError
from megatron_opt.layout.flags import REFUSED
from megatron_opt.layout.kinds import Geometry
from megatron_opt.layout.matrices import Declaration, declare, split_param
from megatron_opt.layout.names import canonical_name
from megatron_opt.layout.parameter import Parameter
from megatron_opt.layout.spec import ModelSpec
from tests.layout import stand_ins
from tests.layout.megatron import arguments
from tests.layout.models import BASE, HYBRID, MODELS, UNTIED

ONE_STAGE = [name for name, words in MODELS.items() if "|" not in words]


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Any:
    platform.activate()
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.install(patch)
        yield


def spec_of(name: str, kind: type[ModelSpec] = ModelSpec) -> Any:
    return kind.of({**parse(MODELS[name].split())[0], "transformer-impl": "local"})


def told(parameters: list[Parameter]) -> list[Any]:
    return [(p.name, p.shape, p.cut, p.expert, p.copy) for p in parameters]


@pytest.mark.parametrize("name", ONE_STAGE)
def test_names_shapes_sides_order_and_counts_are_megatrons(name: str) -> None:
    args, spec = arguments(MODELS[name]), spec_of(name)
    (theirs,) = meta_model.stage_parameters(args, 0)
    assert told(spec.parameters(0, spec.layers)) == told(theirs)
    assert spec.total_parameters == sum(p.numel for p in theirs)
    assert spec.geometry == Geometry.of(meta_model.model_config(args).transformer)


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_megatrons(name: str) -> None:
    args = arguments(f"{MODELS[name]} --pipeline-model-parallel-size 2", 2)
    stages = spec_of(name).stages(2)
    for stage in range(2):
        theirs = meta_model.stage_parameters(args, stage)
        assert [told(chunk) for chunk in stages[stage]] == [told(chunk) for chunk in theirs]


def test_virtual_stages_are_megatrons() -> None:
    args = arguments(f"{BASE} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 2)
    for stage, chunks in enumerate(spec_of("tied").stages(2, 2)):
        assert [told(c) for c in chunks] == [told(c) for c in meta_model.stage_parameters(args, stage)]


def declared(args: Any, rank: int, world: int, **sizes: int) -> Declaration:
    """What one rank of a world declares of Megatron's model, built for that rank."""
    with meta_model.pretended_world(rank, world, **sizes):
        chunks = meta_model.build_chunks(args, 0, **sizes)
        return declare(chunks, chunks[0].config)


@pytest.mark.parametrize("name", [name for name in ONE_STAGE if name != "moe-bias"])  # Megatron: not with TP
def test_two_tensor_parallel_ranks_hold_every_element_of_every_matrix_once(name: str) -> None:
    args, spec = arguments(MODELS[name]), spec_of(name)
    whole: dict[str, torch.Tensor] = {}
    wanted = {p.name: p for p in spec.parameters(0, spec.layers)}
    for rank in range(2):
        found = declared(args, rank, 2, tp=2, etp=2)
        assert {view.name for view in found.views} == set(wanted)
        for view in found.views:
            parameter = wanted[view.name]
            assert tuple(view.param.shape) == parameter.local_shape(2)
            assert view.tp_replicated == (parameter.cut is None)
            infos, pieces, *_ = split_param(
                view.name, parameter.local_shape(2), spec.geometry,
                tp_rank=rank, tp_size=2, partition_dim=parameter.cut,
            )  # fmt: skip
            assert pieces == view.mappings
            assert {info.name: info for info in infos}.items() <= found.matrices.items()
            for piece in view.mappings:
                height, width = (*found.matrices[piece.matrix].shape, 1)[:2]
                count = whole.setdefault(piece.matrix, torch.zeros(height, width))
                times = 1 if not view.tp_replicated else 0.5
                count[piece.row : piece.row + piece.rows, piece.col : piece.col + view.cols] += times
    assert all(bool((count == 1).all()) for count in whole.values())
    assert sum(count.numel() for count in whole.values()) == spec.total_parameters


@pytest.mark.parametrize("name", [name for name in ONE_STAGE if "num-experts" in MODELS[name]])
def test_two_expert_parallel_ranks_hold_the_experts_between_them(name: str) -> None:
    args, spec = arguments(MODELS[name]), spec_of(name)
    held = [{view.name for view in declared(args, rank, 2, ep=2).views} for rank in range(2)]
    everything = spec.parameters(0, spec.layers)
    assert held[0] | held[1] == {p.name for p in everything}
    assert held[0] & held[1] == {p.name for p in everything if p.expert is None}
    assert len(held[0]) == len(held[1])


@pytest.mark.parametrize("name", MODELS)
def test_n_is_that_of_megatrons_matrices(name: str) -> None:
    """Elements of matrices between embedding and output layer; the same number for the cost model."""
    stages = 2 if "|" in MODELS[name] else 1
    args = arguments(f"{MODELS[name]} --pipeline-model-parallel-size {stages}", stages)
    spec = spec_of(name)
    inner = 0
    for stage in range(stages):
        for chunk in meta_model.stage_parameters(args, stage):
            for p in chunk:
                ends = p.name.startswith(("embedding", "output_layer"))
                inner += p.numel if len(p.shape) == 2 and not ends else 0
    assert spec.hidden_parameters == spec_of(name, Model).hidden_parameters == inner
    idle = spec.expert_parameters(0, spec.layers, spec.experts - spec.topk)
    if spec.bias:
        return  # biases of idle experts are no part of N
    assert spec.active_hidden_parameters == inner - idle


def test_mambas_input_projection_is_five_matrices_and_the_rest_no_matrix() -> None:
    found = declared(arguments(MODELS["hybrid-mamba"]), 0, 1)
    mixer = {n.split("mixer.")[1]: m for n, m in found.matrices.items() if n.startswith("decoder.layers.0.mixer.")}
    shapes = {name: info.shape for name, info in mixer.items()}
    heads, inner, state = 8, 64, 8  # 2·32 / 8 heads of 8; two groups of 4 states
    assert {k: v for k, v in shapes.items() if "_proj" in k} == {
        "in_proj.weight.z": (inner, 32),
        "in_proj.weight.x": (inner, 32),
        "in_proj.weight.B": (state, 32),
        "in_proj.weight.C": (state, 32),
        "in_proj.weight.dt": (heads, 32),
        "out_proj.weight": (32, inner),
    }
    assert shapes["conv1d_weight.x"] == (4 * inner,) and shapes["conv1d_weight.C"] == (4 * state,)
    assert {info.kind for name, info in mixer.items() if "_proj" not in name and "norm" not in name} == {"ssm"}
    assert mixer["norm.weight"].kind == "norm"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{UNTIED} --{next(iter(REFUSED))} x", "is not described here"),
        (f"{UNTIED} --moe-latent-size 8", "--moe-latent-size changes the model"),
        (f"{UNTIED} --softmax-type learnable", "not described here"),
        (f"{HYBRID} *G", "gated delta net"),
        (f"{HYBRID} *D", "sparse attention"),
        (f"{HYBRID} *x", "is no layer"),
        (f"{HYBRID} *- --qk-layernorm", "does nothing"),
        (f"{HYBRID} *-/*/-", "must be equal"),
    ],
)
def test_a_structure_that_is_not_described_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelSpec.of(parse(words.split())[0])


@pytest.mark.parametrize(
    ("fused", "local"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.3.self_attention.linear_q_up_proj.layer_norm_bias", "decoder.layers.3.self_attention.q_layernorm.bias"),
        ("decoder.layers.3.self_attention.linear_kv_up_proj.layer_norm_weight", "decoder.layers.3.self_attention.kv_layernorm.weight"),
        ("decoder.layers.3.self_attention.linear_qkv_down_proj.layer_norm_weight", "decoder.layers.3.input_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "decoder.layers.3.pre_mlp_layernorm.weight"),
        ("decoder.layers.3.mixer.in_proj.layer_norm_weight", "decoder.layers.3.norm.weight"),
        ("mtp.layers.0.mtp_model_layer.mlp.linear_fc1.layer_norm_bias", "mtp.layers.0.mtp_model_layer.pre_mlp_layernorm.bias"),
        ("decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc1.weight"),
    ],
)  # fmt: skip
def test_names_are_those_of_the_local_layers(fused: str, local: str) -> None:
    assert canonical_name(fused) == local
