"""Parameter groups: the study's defaults, YAML rules, and what is refused."""

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.optimizers import groups as g
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.mup import init_multiplier

INFOS = [
    MatrixInfo("embedding.word_embeddings.weight", (1000, 32), "embedding"),
    MatrixInfo("decoder.layers.0.self_attention.linear_qkv.weight.q", (32, 32), "hidden", "q", 4),
    MatrixInfo("decoder.layers.0.self_attention.linear_qkv.weight.k", (16, 32), "hidden", "k", 2),
    MatrixInfo("decoder.layers.0.mlp.linear_fc1.weight.gate", (64, 32), "hidden", "gate"),
    MatrixInfo("decoder.layers.0.mlp.linear_fc2.weight", (32, 64), "hidden", "down"),
    MatrixInfo("decoder.layers.0.mlp.linear_fc2.bias", (32,), "bias"),
    MatrixInfo("decoder.layers.0.mlp.router.weight", (4, 32), "router"),
    MatrixInfo("decoder.final_layernorm.weight", (32,), "norm"),
    MatrixInfo("output_layer.weight", (1000, 32), "output"),
]


def by_name(groups):
    return {info.name: group for group in groups for info in group.infos}


def of_kind(groups, kind):
    return next(by_name(groups)[info.name] for info in INFOS if info.kind == kind)


@pytest.mark.parametrize("optimizer", ["muon", "scion", "adamw", "lion"])
def test_every_parameter_is_in_one_group(optimizer):
    groups = g.assign(INFOS, g.default_group_configs(optimizer))
    assert sorted(info.name for group in groups for info in group.infos) == sorted(info.name for info in INFOS)
    assert sum(group.numel for group in groups) == 1000 * 32 * 2 + 32 * 32 + 16 * 32 + 2 * 64 * 32 + 32 + 128 + 32


def test_muon_groups_are_the_studys():
    groups = g.assign(INFOS, g.default_group_configs("muon", {"muon": {"momentum": 0.9}}))
    hidden, scalar = of_kind(groups, "hidden"), of_kind(groups, "embedding")
    assert (hidden.optimizer, hidden.lr_scale, hidden.clip_scope, hidden.decay(0.1)) == (
        "muon",
        1.0,
        None,
        0.1,
    )
    assert hidden.options == {"momentum": 0.9}
    assert (scalar.optimizer, scalar.lr_scale, scalar.clip_scope) == ("adamw", 0.3, "global")
    assert scalar.options == {"beta1": 0.8, "beta2": 0.98, "eps": 1e-15}
    assert [of_kind(groups, kind).optimizer for kind in ("output", "router", "norm", "bias")] == ["adamw"] * 4
    (vectors,) = g.assign([MatrixInfo("mixer.A_log", (8,), "ssm")], g.default_group_configs("adamw"))
    assert [of_kind(groups, kind).decay(0.1) for kind in g.KINDS[:-1]] == [0.1, 0.0, 0.1, 0.1, 0.0, 0.0]
    assert vectors.decay(0.1) == 0.0 and g.KINDS[-1] == "ssm"


def test_flags_win_over_the_studys_values():
    group_configs = g.default_group_configs("muon", {"adamw": {"beta1": 0.9}}, scalar_lr_scale=0.5)
    scalar = of_kind(g.assign(INFOS, group_configs), "norm")
    assert scalar.options["beta1"] == 0.9 and scalar.options["beta2"] == 0.98 and scalar.lr_scale == 0.5


def test_scion_forms_fix_the_decay():
    decays = []
    for form in ("study", "unconstrained", "constrained"):
        groups = g.assign(INFOS, g.default_group_configs("scion", {"scion": {"form": form}}))
        decays.append((of_kind(groups, "hidden").decay(0.1), of_kind(groups, "output").decay(0.1)))
    assert decays == [(0.1, 0.1), (0.0, 0.0), (1.0, 1.0)]


def test_yaml_rules(tmp_path):
    path = tmp_path / "groups.yaml"
    path.write_text(
        "groups:\n"
        "- {match: 'role=q,k', optimizer: muon, options: {momentum: 0.8}, lr_scale: 0.5, weight_decay: 0.3}\n"
        "- {match: 'linear_fc', optimizer: muon, weight_decay: false}\n"
        "- {match: '.*', optimizer: adamw, clip: scalars, decay_mode: cautious}\n"
    )
    with pytest.raises(UserError, match="vectors"):  # linear_fc matches a bias
        g.assign(INFOS, g.load_group_configs(path))
    path.write_text(path.read_text().replace("'linear_fc'", "'linear_fc.*weight'"))
    named = by_name(g.assign(INFOS, g.load_group_configs(path, {"muon": {"num_ns_steps": 6, "momentum": 0.7}})))
    q, fc2 = named[INFOS[1].name], named[INFOS[4].name]
    assert q.options == {"momentum": 0.8, "num_ns_steps": 6} and q.lr_scale == 0.5 and q.decay(0.1) == 0.3
    assert fc2.options == {"momentum": 0.7, "num_ns_steps": 6} and fc2.decay(0.1) == 0.0
    assert named[INFOS[0].name].clip_scope == "scalars" and named[INFOS[8].name].decay_mode == "cautious"


@pytest.mark.parametrize(
    "text, words",
    [
        ("groups: []", "no list"),
        ("- a", "no list"),
        ("groups: [{match: a}]", "at least"),
        ("groups: [{match: '.*', optimizer: muon, wd: 1}]", "no key 'wd'"),
        ("groups: [{match: '(', optimizer: muon}]", "regular expression"),
        ("groups: [{match: 'kind=hidden', optimizer: muon}]", "no group takes 5 parameters"),
        ("groups: [{match: '.*', optimizer: adamw}, {match: 'fc1', optimizer: muon}]", "earlier groups"),
        ("groups: [{match: 'fc9', optimizer: muon}, {match: '.*', optimizer: adamw}]", "no parameter has"),
        ("groups: [{match: '.*', optimizer: muonn}]", "no optimizer 'muonn'"),
        ("groups: [{match: '.*', optimizer: adamw, options: {betta: 1}}]", "no option 'betta'"),
        ("groups: [{match: '.*', optimizer: adamw, decay_mode: x}]", "decay_mode"),
        ("groups: [", "YAML"),
        (
            "groups: [{match: '.*', optimizer: adamw, weight_decay: -0.1}]",
            "groups.yaml, group 1: .*weight_decay is -0.1",
        ),
        ("groups: [{match: '.*', optimizer: adamw, weight_decay: .nan}]", "weight_decay is nan"),
        ("groups: [{match: '.*', optimizer: adamw, weight_decay: many}]", "weight_decay is 'many'"),
        ("groups: [{match: '.*', optimizer: adamw, lr_scale: -1}]", "groups.yaml, group 1: .*lr_scale is -1"),
        ("groups: [{match: '.*', optimizer: adamw, lr_scale: .nan}]", "lr_scale is nan"),
        ("groups: [{match: '.*', optimizer: adamw, lr_scale: .inf}]", "lr_scale is inf"),
        ("groups: [{match: '.*', optimizer: adamw, lr_scale: true}]", "lr_scale is True"),
        ("groups: [{match: '.*', optimizer: adamw, lr_scale: half}]", "lr_scale is 'half'"),
        ("groups: [{match: '.*', optimizer: adamw, clip: 3}]", "clip is 3"),
        ("groups: [{match: '.*', optimizer: adamw, optional: maybe}]", "optional is 'maybe'"),
        ("groups: [{match: '.*', optimizer: adamw, options: [1]}]", "options is"),
        ("groups: [{match: 3, optimizer: adamw}]", "match is 3"),
        (
            "groups: [{match: '.*', optimizer: adamw, options: {beta1: 1}}]",
            "groups.yaml, group 1: --adamw-beta1 is 1.0",
        ),
    ],
)
def test_bad_rules_are_refused_with_a_remedy(tmp_path, text, words):
    path = tmp_path / "groups.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        g.assign(INFOS, g.load_group_configs(path))


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "groups.yaml"
    options = "lr_scale: 3e-1, weight_decay: 1e-1, options: {eps: 1e-8}"
    path.write_text(f"groups: [{{match: '.*', optimizer: adamw, {options}}}]")
    (group_config,) = g.load_group_configs(path)
    assert (group_config.lr_scale, group_config.weight_decay, group_config.options) == (0.3, 0.1, {"eps": 1e-8})


def test_describe_counts():
    text = g.describe(g.assign(INFOS, g.default_group_configs("muon")), 0.1)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["optimizer", "kinds", "matrices", "parameters"]
    assert lines[1].split()[:6] == ["muon", "hidden", "4", "5,632", "1", "0.1"]
    assert lines[-1].split() == ["total", "9", "69,824"]


@pytest.mark.parametrize(
    "optimizer, flags, hidden, others",
    [
        ("adamw", {}, 0.25, 1.0),
        ("lion", {}, 0.25, 1.0),
        ("soap", {}, 0.5, 1.0),
        ("adam_mini", {}, 0.25, 1.0),
        ("kron", {}, 0.5, 1.0),
        ("muon", {}, 1.0, 0.3),
        ("muon", {"muon": {"scale_mode": "spectral"}}, 0.5, 0.3),
        ("scion", {}, 1.0, 0.1),
        ("shampoo", {}, 0.5, 1.0),
        ("muon_h", {}, 1.0, 1.0),
    ],
)
def test_learning_rates_follow_the_width(optimizer, flags, hidden, others):
    groups = g.assign(INFOS, g.default_group_configs(optimizer, flags), width_ratio=4.0)
    assert of_kind(groups, "hidden").lr_scale == hidden
    assert {of_kind(groups, kind).lr_scale for kind in ("embedding", "output", "norm", "bias")} == {others}


def test_routers_follow_the_width_as_hidden_matrices_do():
    groups = g.assign(INFOS, g.default_group_configs("muon"), width_ratio=4.0)
    assert of_kind(groups, "router").optimizer == "adamw" and of_kind(groups, "router").lr_scale == 0.3 * 0.25


@pytest.mark.parametrize("name", ["muon", "scion", "soap", "kron", "signum", "adamw"])
def test_width_multipliers_keep_a_steps_effect(name):
    """‖lr·u‖₂ on a hidden matrix is the same at four times the width, on low-rank gradients (on noise for Kron)."""
    sizes = []
    for width in (32, 128):
        torch.manual_seed(0)
        group_config, info = registry.build(name, {}), MatrixInfo("w", (width, width))
        outer = torch.randn(width, 1) @ torch.randn(1, width)
        weight = torch.zeros(width, width)
        state = (
            group_config.init_state(weight, info)
            if isinstance(group_config, MatrixOptimizer)
            else group_config.init_state(weight)
        )
        for t in range(1, 60):
            grad = torch.randn(width, width) if name == "kron" else outer + 0.01 * torch.randn(width, width)
            if isinstance(group_config, MatrixOptimizer):
                (u,) = group_config.update([grad], [state], t, [info])
            else:
                u = torch.zeros(width, width)
                group_config.update([u], [grad], [state], t, 1.0, 0.0)
        sizes.append(float(torch.linalg.matrix_norm(u, 2)) * (width / 32) ** group_config.width_exponent())
    assert 0.7 < sizes[1] / sizes[0] < 1.45


def test_init_follows_the_width():
    assert [init_multiplier(info, 4.0) for info in INFOS] == [1.0, 0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 1.0, 1.0]
