"""Schedule-free AdamW and Prodigy against float64 transcriptions of their papers, and peers."""

import importlib

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import ParamGroupConfig, assign
from tests.optimizers.test_elementwise import LR, SHAPES, WD, assert_same, gradients, ours, peer, start

RATES = [LR * min(1.0, t / 10) * (1.0 if t < 30 else 0.5) for t in range(1, 51)]  # warmup, and a fall


def stepped(name, options, grads, rates, dtype=torch.float64, **keywords):
    """Weights and the rule after steps with a rate each."""
    optimizer, params = registry.build(name, options), start(dtype)
    states = [optimizer.init_state(p) for p in params]
    for t, (gs, rate) in enumerate(zip(grads, rates), 1):
        optimizer.update(params, [g.to(dtype).clone() for g in gs], states, t, rate, WD, **keywords)
    return params, states, optimizer


def paper_schedule_free(grads, rates, beta1=0.9, beta2=0.999, eps=1e-8, power=2.0, steps=0.0):
    """Algorithm 1 with the weights γ_max² of its warmup: y and x."""
    z, x = start(), start()
    y, v, total, largest = start(), [torch.zeros(s, dtype=torch.float64) for s in SHAPES], 0.0, 0.0
    for t, (gs, rate) in enumerate(zip(grads, rates), 1):
        largest = max(largest, rate)
        weight = t**steps * largest**power
        total += weight
        for i, g in enumerate(gs):
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            s = g / ((v[i] / (1 - beta2**t)) ** 0.5 + eps) + WD * y[i]
            z[i] = z[i] - rate * s
            x[i] = (1 - weight / total) * x[i] + weight / total * z[i]
            y[i] = (1 - beta1) * z[i] + beta1 * x[i]
    return y, x


@pytest.mark.parametrize(
    "options, given",
    [
        ({}, {}),
        ({"beta1": 0.0}, {"beta1": 0.0}),
        (
            {"beta1": 0.98, "weight_lr_power": 0.0, "weight_step_power": 8.0},
            {"beta1": 0.98, "power": 0.0, "steps": 8.0},
        ),
    ],
)
def test_schedule_free_is_the_papers(options, given):
    grads = gradients()
    y, x = paper_schedule_free(grads, RATES, **given)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        found, states, _ = stepped("schedule_free", options, grads, RATES, dtype)
        assert_same(found, y, tolerance)
        assert_same([p - state["lead"] for p, state in zip(found, states)], x, tolerance)


def schedule_free_of_pytorch_optimizer(params):
    module = importlib.import_module("pytorch_optimizer")
    return module.ScheduleFreeAdamW(params, lr=LR, betas=(0.9, 0.999), weight_decay=WD, foreach=False)


def prodigy_of_pytorch_optimizer(params):
    module = importlib.import_module("pytorch_optimizer")
    return module.Prodigy(params, lr=1.0, weight_decay=WD, foreach=False)


def test_pytorch_optimizer_agrees():
    pytest.importorskip("pytorch_optimizer")
    grads = gradients()
    assert_same(ours("schedule_free", {}, grads), peer(schedule_free_of_pytorch_optimizer, grads), 1e-9)
    grads = gradients(20)  # its sums are in fp32
    assert_same(ours("prodigy", {}, grads, lr=1.0), peer(prodigy_of_pytorch_optimizer, grads), 1e-6)


def paper_prodigy(
    grads, rates, beta1=0.9, beta2=0.999, beta3=None, d0=1e-6, coef=1.0, growth=float("inf"), correct=False
):
    """Algorithm 4 and the authors' code: weights and every d."""
    beta3, d, largest, r, seen = beta3 or beta2**0.5, d0, d0, 0.0, []
    w, first = start(), start()
    m, v, s = ([torch.zeros(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(3))
    for t, (gs, rate) in enumerate(zip(grads, rates), 1):
        rate = d * rate * ((1 - beta2**t) ** 0.5 / (1 - beta1**t) if correct else 1.0)
        r = beta3 * r + d / d0 * rate * float(sum((g * (a - b)).sum() for g, a, b in zip(gs, first, w)))
        for i, g in enumerate(gs):
            m[i] = beta1 * m[i] + (1 - beta1) * d * g
            v[i] = beta2 * v[i] + (1 - beta2) * d**2 * g**2
            s[i] = beta3 * s[i] + d / d0 * rate * g
        estimate = coef * r / float(sum(x.abs().sum() for x in s))
        if d == d0:
            d = max(d, estimate)
        largest = max(largest, estimate)
        d = min(largest, d * growth)
        for i in range(len(w)):
            w[i] = w[i] - rate * (m[i] / (v[i] ** 0.5 + d * 1e-8) + WD * w[i])
        seen.append(d)
    return w, seen


@pytest.mark.parametrize(
    "options, given",
    [
        ({}, {}),
        ({"d0": 1e-3, "d_coef": 2.0, "beta3": 0.9}, {"d0": 1e-3, "coef": 2.0, "beta3": 0.9}),
        ({"growth_rate": 1.5, "bias_correction": True}, {"growth": 1.5, "correct": True}),
    ],
)
def test_prodigy_is_the_papers(options, given):
    grads, rates = gradients(20), [200 * rate for rate in RATES[:20]]
    wanted, d = paper_prodigy(grads, rates, **given)
    found, _, optimizer = stepped("prodigy", options, grads, rates)
    assert_same(found, wanted, 1e-10)
    assert float(optimizer.numbers["d"]) == pytest.approx(d[-1], rel=1e-10) and d[-1] > 3 * d[0]
    assert_same(stepped("prodigy", options, grads, rates, torch.float32)[0], wanted, 1e-4)


def test_prodigy_finds_its_rate_on_a_quadratic():
    """½‖W − T‖² from 0, rate 1 falling to 0: d ends near the largest distance of an element."""
    optimizer, generator = registry.build("prodigy", {}), torch.Generator().manual_seed(3)
    target, params = torch.randn(50, 60, generator=generator), [torch.zeros(50, 60)]
    states = [optimizer.init_state(params[0])]
    for t in range(1, 401):
        noise = 0.1 * torch.randn(50, 60, generator=generator)
        optimizer.update(params, [params[0] - target + noise], states, t, 1 - t / 400, 0.0)
    assert (params[0] - target).norm() / target.norm() < 0.05
    assert 0.01 < float(optimizer.numbers["d"]) < 1.0


def test_prodigy_does_not_know_the_scale_of_the_loss():
    grads, rates = gradients(20), [1.0] * 20
    once, _, first = stepped("prodigy", {}, grads, rates)
    scaled, _, second = stepped("prodigy", {}, grads, rates, grad_scale=1e3)
    assert_same(once, scaled, 1e-5)  # ε aside
    assert float(first.numbers["d"]) == pytest.approx(float(second.numbers["d"]), rel=1e-5)


def test_prodigy_resumes_bit_for_bit_from_state_and_numbers():
    grads = gradients(8, torch.float32)
    whole = stepped("prodigy", {}, grads, [1.0] * 8, torch.float32)[0]
    params, states, optimizer = stepped("prodigy", {}, grads[:4], [1.0] * 4, torch.float32)
    again = registry.build("prodigy", {})
    again.numbers = {key: float(value) for key, value in optimizer.numbers.items()}
    for t, gs in enumerate(grads[4:], 5):
        again.update(params, [g.clone() for g in gs], states, t, 1.0, WD)
    assert all(torch.equal(a, b) for a, b in zip(params, whole))


def test_prodigy_has_no_exponent_and_one_rate():
    with pytest.raises(UserError, match="train without --use-mup"):
        registry.build("prodigy", {}).width_exponent()
    infos = [MatrixInfo("a", (4, 4)), MatrixInfo("b", (4, 4))]
    rules = [ParamGroupConfig("a", "prodigy", lr_scale=0.5), ParamGroupConfig("b", "prodigy")]
    with pytest.raises(UserError, match=r"lr_scale 0\.5 and 1; give them the same \(--optimizer-groups\)"):
        assign(infos, rules)
    decays = [ParamGroupConfig("a", "prodigy", weight_decay=False), ParamGroupConfig("b", "prodigy")]
    assert len(assign(infos, decays)) == 2


@pytest.mark.parametrize("mode", ["independent", "cautious"])
def test_other_decay(mode):
    """On the first step both rules are Adam's sign step from the start."""
    for name, rate in (("schedule_free", 0.01), ("prodigy", 1e-2)):
        options = {"d0": 1.0} if name == "prodigy" else {}
        (params, _, _), base = stepped(name, options, gradients(1), [rate], decay_mode=mode), start()
        scale = rate * (0.1 / 0.001**0.5 if name == "prodigy" else 1.0)
        for p, old, g in zip(params, base, gradients(1)[0]):
            lost = WD * old if mode == "independent" else rate * WD * old * (g * old >= 0)
            torch.testing.assert_close(
                p, old - scale * g.sign() - lost, rtol=1e-4, atol=1e-4
            )  # ε beside small gradients
