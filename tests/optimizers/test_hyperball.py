"""Hyperball: steps and weights on spheres, for any rule; against its own formula in float64 and a peer."""

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.optimizers import groups, registry
from megatron_opt.optimizers.base import MatrixInfo

WRAPPED = sorted(name for name in registry.optimizers() if name.endswith("_h"))


def step(optimizer, weight, grad, state, t, info, lr):
    """What the caller does with a rule that projects."""
    (u,) = optimizer.update([grad], [state], t, [info])
    weight = weight - lr * u
    return weight * optimizer.projection(weight.double().square().sum(), state)


def test_the_named_rules_are_there():
    assert {"muon_h", "adam_h", "soap_h"} <= set(WRAPPED)


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_and_steps_stay_on_spheres(name):
    torch.manual_seed(0)
    optimizer, info = registry.build(name, {}), MatrixInfo("w", (12, 8))
    weight = torch.randn(12, 8)
    radius, moved = float(weight.norm()), 0
    state = optimizer.init_state(weight.clone(), info)
    for t in range(1, 8):
        grad = torch.randn(12, 8)
        (u,) = optimizer.update([grad.clone()], [{k: v.clone() for k, v in state.items()}], t, [info])
        moved += bool(u.any())
        assert not u.any() or float(u.norm()) == pytest.approx(radius, rel=1e-5)
        weight = step(optimizer, weight, grad, state, t, info, 0.1)
        assert float(weight.norm()) == pytest.approx(radius, rel=1e-5)
    assert moved >= 6  # SOAP's first step begins bases and moves nothing


@pytest.mark.parametrize("name", WRAPPED)
def test_finds_a_point_on_the_sphere(name):
    torch.manual_seed(0)
    optimizer, info = registry.build(name, {}), MatrixInfo("w", (12, 8))
    weight, target = torch.randn(12, 8), torch.randn(12, 8)
    target *= weight.norm() / target.norm()
    state = optimizer.init_state(weight.clone(), info)

    def cosine():
        return float((weight * target).sum() / weight.norm() / target.norm())

    for t in range(1, 201):
        grad = weight - target + 0.1 * torch.randn(12, 8)
        weight = step(optimizer, weight, grad, state, t, info, 0.1 * (1 - t / 201))
    assert cosine() > 0.95


def test_adam_h_is_the_papers():
    torch.manual_seed(0)
    b1, b2, eps, lr = 0.9, 0.98, 1e-10, 0.05
    weight = torch.randn(6, 9, dtype=torch.float64)
    ours, info = weight.clone(), MatrixInfo("w", (6, 9))
    optimizer = registry.build("adam_h", dict(beta1=b1, beta2=b2, eps=eps))
    state = optimizer.init_state(ours.clone(), info)
    radius, m, v = weight.norm(), torch.zeros_like(weight), torch.zeros_like(weight)
    for t in range(1, 51):
        g = torch.randn(6, 9, dtype=torch.float64)
        ours = step(optimizer, ours, g.clone(), state, t, info, lr)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        weight = weight - lr * radius * u / u.norm()
        weight = radius * weight / weight.norm()
        torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-12)


def test_muon_h_equals_emerging_optimizers_over_50_steps():
    peer = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_hyperball")
    torch.manual_seed(0)
    start = torch.randn(12, 20)
    grads = [torch.randn(12, 20) for _ in range(50)]
    parameter = torch.nn.Parameter(start.clone())
    theirs = peer.MuonHyperball(
        [parameter], lr=0.05, momentum=0.9, weight_decay=0.0, nesterov=True, fp32_matmul_prec="high",
        coefficient_type="simple", scale_mode="spectral",
    )  # fmt: skip
    options = dict(momentum=0.9, momentum_form="ema", eps=1e-7, norm_form="max", fp32_matmul_prec="high")
    optimizer, info = registry.build("muon_h", options), MatrixInfo("w", (12, 20))
    state, weight = optimizer.init_state(start.clone(), info), start.clone()
    for t, g in enumerate(grads, 1):
        parameter.grad = g.clone()
        theirs.step()
        weight = step(optimizer, weight, g.clone(), state, t, info, 0.05)
    assert float((weight - parameter.detach()).norm() / weight.norm()) < 1e-5


def test_weight_decay_and_zero_weights_are_refused():
    info = MatrixInfo("layer.weight", (4, 4))
    optimizers = [groups.ParamGroupConfig(".*", "muon_h", weight_decay=True)]
    with pytest.raises(UserError, match="weight decay means nothing"):
        groups.assign([info], optimizers)
    with pytest.raises(UserError, match="starts at zero"):
        registry.build("muon_h", {}).init_state(torch.zeros(4, 4), info)


@pytest.mark.parametrize("name", ["muon_h", "adam_h", "soap_h"])
def test_default_groups(name):
    infos = [
        MatrixInfo("embedding", (50, 8), "embedding"),
        MatrixInfo("layer.weight", (8, 8), "hidden"),
        MatrixInfo("norm", (8,), "norm"),
        MatrixInfo("output", (50, 8), "output"),
    ]
    found = groups.assign(infos, groups.default_group_configs(name))
    named = {info.name: group for group in found for info in group.infos}
    assert [named[i.name].optimizer for i in infos] == ["adamw", name, "adamw", "adam_h"]
    assert [named[i.name].decay(0.1) for i in infos] == [0.0, 0.0, 0.0, 0.0]
    scopes = [named[i.name].clip_scope for i in infos]
    assert None not in scopes and len(set(scopes)) == 3
