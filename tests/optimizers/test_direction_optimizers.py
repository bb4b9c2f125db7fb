"""AdEMAMix and ADOPT against float64 transcriptions of their papers, and peers."""

import importlib
import math

import pytest
import torch

from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from tests.optimizers.test_elementwise import LR, SHAPES, WD, assert_same, gradients, ours, paper, peer, start


def paper_ademamix(gs, hs, t, beta1=0.9, beta2=0.999, beta3=0.9999, alpha=5.0, eps=1e-8, horizon=0):
    """Algorithm 1, with α and β3 of equations 4 and 5 over `horizon` steps."""
    if horizon:
        log_1, log_3 = math.log(beta1), math.log(beta3)
        alpha = min(t * alpha / horizon, alpha)
        share = t / horizon
        beta3 = min(math.exp(log_1 * log_3 / ((1 - share) * log_3 + share * log_1)), beta3)
    out = []
    for g, h in zip(gs, hs):
        h["m1"] = beta1 * h.get("m1", 0) + (1 - beta1) * g
        h["m2"] = beta3 * h.get("m2", 0) + (1 - beta3) * g
        h["v"] = beta2 * h.get("v", 0) + (1 - beta2) * g**2
        out.append((h["m1"] / (1 - beta1**t) + alpha * h["m2"]) / ((h["v"] / (1 - beta2**t)) ** 0.5 + eps))
    return out


def paper_adopt(gs, hs, t, beta1=0.9, beta2=0.9999, eps=1e-6, power=0.25):
    """Algorithm 2; its step 0 is ours 1."""
    out = []
    for g, h in zip(gs, hs):
        if t == 1:
            h["v"], h["m"] = g**2, torch.zeros_like(g)
        else:
            limit = (t - 1) ** power
            normalized = torch.clamp(g / torch.clamp(h["v"] ** 0.5, min=eps), -limit, limit)
            h["m"] = beta1 * h["m"] + (1 - beta1) * normalized
            h["v"] = beta2 * h["v"] + (1 - beta2) * g**2
        out.append(h["m"].clone())
    return out


VARIANTS = [
    ("ademamix", {}, paper_ademamix, {}),
    ("ademamix", {"warmup_steps": 30, "alpha": 8.0, "beta3": 0.99}, paper_ademamix,
     {"horizon": 30, "alpha": 8.0, "beta3": 0.99}),
    ("adopt", {}, paper_adopt, {}),
    ("adopt", {"beta2": 0.9, "clip_exponent": 0.0}, paper_adopt, {"beta2": 0.9, "power": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("name, options, optimizer, paper_options", VARIANTS)
def test_rules_are_the_papers(name, options, optimizer, paper_options):
    grads = gradients()
    wanted = paper(optimizer, grads, **paper_options)
    assert_same(ours(name, options, grads), wanted)
    for x, y in zip(ours(name, options, grads, torch.float32), wanted, strict=True):
        assert (x.double() - y).norm() / y.norm() < 1e-6


def ademamix_of_pytorch_optimizer(params):
    return importlib.import_module("pytorch_optimizer").AdEMAMix(
        params, lr=LR, betas=(0.9, 0.999, 0.99), alpha=5.0, t_alpha_beta3=40, eps=1e-8, weight_decay=WD,
        weight_decouple=True, foreach=False,
    )  # fmt: skip


def adopt_of_pytorch_optimizer(params):
    """Its clip is (its step, from 1)^¼ where the authors' count from 0: one more than the paper's."""
    return importlib.import_module("pytorch_optimizer").ADOPT(
        params, lr=LR, betas=(0.9, 0.9999), clip_lambda=lambda step: (step - 1) ** 0.25, eps=1e-6, weight_decay=WD,
        weight_decouple=True, foreach=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, options, factory",
    [
        ("ademamix", {"beta3": 0.99, "warmup_steps": 40}, ademamix_of_pytorch_optimizer),
        ("adopt", {}, adopt_of_pytorch_optimizer),
    ],
)
def test_pytorch_optimizer_agrees(name, options, factory):
    pytest.importorskip("pytorch_optimizer")
    grads = gradients()
    assert_same(ours(name, options, grads), peer(factory, grads), 1e-9)


def test_pieces_beyond_what_is_held_at_once_step_alike(monkeypatch):
    from megatron_opt.optimizers import direction_optimizer

    grads, whole = gradients(4), ours("ademamix", {}, gradients(4))
    monkeypatch.setattr(direction_optimizer, "_AT_ONCE", 40)
    assert_same(ours("ademamix", {}, grads), whole, 0)


@pytest.mark.parametrize("name", ["ademamix", "adopt"])
def test_copies_and_decay_modes_are_the_fused_kernels(name):
    optimizer, params = registry.build(name, {}), start(torch.float32)
    states = [optimizer.init_state(p) for p in params]
    copies = [torch.empty(p.shape, dtype=torch.bfloat16) for p in params]
    for t, gs in enumerate(gradients(2, torch.float32), 1):
        before = [p.clone() for p in params]
        optimizer.update(params, gs, states, t, LR, 0.0, copies=copies)
    moved = [(a - b) / LR for a, b in zip(before, params)]
    decayed, states = start(torch.float32), [optimizer.init_state(p) for p in params]
    for t, gs in enumerate(gradients(2, torch.float32), 1):
        decayed = start(torch.float32) if t == 1 else [p.clone() for p in before]
        optimizer.update(decayed, gs, states, t, LR, WD, decay_mode="cautious")
    for p, copy, u, old, new in zip(params, copies, moved, before, decayed):
        assert torch.equal(copy, p.bfloat16())
        wanted = old - LR * (u + WD * old * (u * old >= 0))
        torch.testing.assert_close(new, wanted, rtol=1e-5, atol=1e-6)


def test_a_hyperball_of_them_is_their_direction():
    info = MatrixInfo("layers.0.weight", SHAPES[0])
    for name in ("ademamix", "adopt"):
        optimizer, inner, weight = registry.build(f"{name}_h", {}), registry.build(name, {}), start()[0]
        state, held, moved = optimizer.init_state(weight, info), inner.init_state(weight), torch.zeros_like(weight)
        for t, gs in enumerate(gradients(3), 1):
            (u,) = optimizer.update([gs[0].clone()], [state], t, [info])
            moved.zero_()
            inner.update([moved], [gs[0]], [held], t, 1.0, 0.0)
        torch.testing.assert_close(u, -moved * state["radius"] / moved.norm(), rtol=1e-12, atol=0)
