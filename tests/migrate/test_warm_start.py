"""The mathematics of warm starts: scales, rotations, round trips."""

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.migrate import warm_start
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

INFO = MatrixInfo("w", (12, 20))


def moments(seed: int = 0, shape: tuple[int, ...] = INFO.shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(shape, generator=generator) * 0.1
    return m, m.square() + torch.rand(shape, generator=generator)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "momentum_form": "ema"}])
def test_muons_momentum_is_what_it_would_be_under_the_same_gradients(options: dict) -> None:
    """Under a constant gradient AdamW's m is that gradient; Muon's own steps lead to the same buffer as the fill."""
    rule = registry.build("muon", options)
    g = torch.randn(INFO.shape, generator=torch.Generator().manual_seed(1))
    stepped = rule.init_state(torch.zeros(INFO.shape), INFO)
    for step in range(1, 300):
        rule.update([g.clone()], [stepped], step, [INFO])
    filled = rule.init_state(torch.zeros(INFO.shape), INFO)
    warm_start.fill_matrix(rule, INFO, filled, g, g.square())
    torch.testing.assert_close(filled["momentum_buffer"], stepped["momentum_buffer"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "scion", "soap", "muon_h", "adam_h"])
def test_first_moments_return_as_they_went(name: str) -> None:
    rule = registry.build(name, {"block_size": 8} if name == "soap" else {})
    state = rule.init_state(torch.ones(INFO.shape), INFO)
    m, v = moments()
    warm_start.fill_matrix(rule, INFO, state, m, v)
    back, second = warm_start.moments_of_matrix(rule, INFO, state)
    torch.testing.assert_close(back, m, rtol=1e-6, atol=1e-7)
    assert second.shape == v.shape and bool((second >= 0).all())


def test_soaps_second_moment_is_adams_in_the_new_basis() -> None:
    """Against gradients drawn with Adam's mean and variance: factors, and squares in the eigenbasis."""
    rule = registry.build("soap", {"block_size": 0})
    state = rule.init_state(torch.zeros(INFO.shape), INFO)
    m, v = moments(2)
    warm_start.fill_matrix(rule, INFO, state, m, v)
    left, right = state["q_0_0"][0], state["q_0_1"][0]
    generator = torch.Generator().manual_seed(3)
    draws = m + (v - m.square()).sqrt() * torch.randn(40000, *INFO.shape, generator=generator)
    torch.testing.assert_close((draws @ draws.mT).mean(0), state["gg_0_0"][0], rtol=0.05, atol=0.2)
    torch.testing.assert_close((draws.mT @ draws).mean(0), state["gg_0_1"][0], rtol=0.05, atol=0.2)
    rotated = (left.mT @ draws @ right).square().mean(0)
    torch.testing.assert_close(rotated, state["exp_avg_sq"], rtol=0.06, atol=0.01)
    for basis, factor in ((left, state["gg_0_0"][0]), (right, state["gg_0_1"][0])):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis)), rtol=0, atol=1e-5)
        inside = basis.mT @ factor @ basis
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-4)
    assert state["ready"].item() == 1


def test_a_warm_soap_moves_at_once_and_by_adams_size() -> None:
    rule = registry.build("soap", {"block_size": 0})
    state = rule.init_state(torch.zeros(INFO.shape), INFO)
    m, v = moments(4)
    warm_start.fill_matrix(rule, INFO, state, m, v)
    (u,) = rule.update([m.clone()], [state], 1001, [INFO])
    adam = m / v.sqrt()
    assert 0.5 < float(u.norm() / adam.norm()) < 2.0
    cold = rule.init_state(torch.zeros(INFO.shape), INFO)
    assert float(rule.update([m.clone()], [cold], 1001, [INFO])[0].norm()) == 0


def test_second_moment_from_momentum_alone() -> None:
    """Noise of known variance per row: the estimate from one momentum finds it within sampling error."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.linspace(0.5, 2.0, 64).unsqueeze(1)
    m = torch.zeros(64, 512)
    for _ in range(200):
        m.lerp_(scale * torch.randn(64, 512, generator=generator), 0.1)
    found = warm_start.rank_one(m, 0.9)
    torch.testing.assert_close(found.mean(1), scale.square().squeeze(1), rtol=0.2, atol=0.0)


def test_elements_keep_what_they_share() -> None:
    m, v = moments(6, (50,))
    for name, keys in {"adamw": 2, "mars": 3, "lion": 1, "cautious": 2}.items():
        rule = registry.build(name, {})
        state = rule.init_state(torch.zeros(50))
        warm_start.fill_elements(rule, state, m, v)
        assert len(state) == keys and torch.equal(state["exp_avg"], m)
        assert "exp_avg_sq" not in state or torch.equal(state["exp_avg_sq"], v)


def test_rules_without_a_way_are_refused() -> None:
    assert warm_start.supported("soap", registry.build("soap", {}))
    for name in ("kron", "sophia", "adam_mini"):
        assert not warm_start.supported(name, registry.build(name, {}))
    assert isinstance(warm_start.refuse(["kron"]), UserError)
