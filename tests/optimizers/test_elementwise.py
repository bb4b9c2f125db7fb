"""Element-wise rules against float64 transcriptions of the papers, and peers where definitions agree."""

import importlib

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.kernels.dispatch import native_available
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import Reducer

SHAPES = [(7, 5), (64,), (3, 1), (40, 60)]
LR, WD, STEPS = 3e-3, 0.1, 50
RULES = ["adamw", "nadamw", "mars", "cautious", "lion", "signum", "sophia", "ademamix", "adopt", "schedule_free"]
NARROW = [name for name in RULES if hasattr(registry.optimizers()[name].Config, "state_dtype")]


def gradients(steps=STEPS, dtype=torch.float64, seed=0):
    """Noise around a common direction, so that the momentum and the masks are not all noise."""
    generator = torch.Generator().manual_seed(seed)
    mean = [torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES]
    return [[(m + torch.randn(m.shape, dtype=torch.float64, generator=generator)).to(dtype) for m in mean]
            for _ in range(steps)]  # fmt: skip


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(99)
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype) for s in SHAPES]


def ours(name, options, grads, dtype=torch.float64, lr=LR, wd=WD, curvature=None, **keywords):
    optimizer = registry.build(name, options)
    params = start(dtype)
    states = [optimizer.init_state(p) for p in params]
    for t, step_grads in enumerate(grads, 1):
        optimizer.update(params, [g.to(dtype).clone() for g in step_grads], states, t, lr, wd, **keywords)
        if curvature is not None and optimizer.curvature_due(t):
            optimizer.update_curvature(states, [c.to(dtype) for c in curvature[t - 1]])
    return params


# The papers' formulas, one parameter at a time; `h` holds what is kept between steps.
def adam(c, h, t, beta1, beta2, eps):
    h["m"] = beta1 * h.get("m", 0) + (1 - beta1) * c
    h["v"] = beta2 * h.get("v", 0) + (1 - beta2) * c**2
    return h["m"] / (1 - beta1**t) / ((h["v"] / (1 - beta2**t)) ** 0.5 + eps)


def paper_adamw(gs, hs, t, beta1=0.9, beta2=0.98, eps=1e-10):
    return [adam(g, h, t, beta1, beta2, eps) for g, h in zip(gs, hs)]


def paper_nadamw(gs, hs, t, beta1=0.95, beta2=0.98, eps=1e-10):
    out = []
    for g, h in zip(gs, hs):
        adam(g, h, t, beta1, beta2, eps)
        m = beta1 * h["m"] / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        out.append(m / ((h["v"] / (1 - beta2**t)) ** 0.5 + eps))
    return out


def paper_mars(gs, hs, t, beta1=0.95, beta2=0.98, eps=1e-25, gamma=0.025, limit=1.0, scope="global"):
    cs = [g + gamma * beta1 / (1 - beta1) * (g - h.get("previous", 0)) for g, h in zip(gs, hs)]
    for g, h in zip(gs, hs):
        h["previous"] = g.clone()
    norms = [c.square().sum().sqrt() for c in cs]
    if scope == "global":
        norms = [torch.stack(norms).square().sum().sqrt() + 1e-6] * len(cs)
    cs = [c * min(1.0, limit / float(n)) for c, n in zip(cs, norms)] if limit else cs
    return [adam(c, h, t, beta1, beta2, eps) for c, h in zip(cs, hs)]


def paper_cautious(gs, hs, t, beta1=0.98, beta2=0.98, eps=1e-25, form="study"):
    out = []
    for g, h in zip(gs, hs):
        u = adam(g, h, t, beta1, beta2, eps)
        mask = (u * g > 0).double()
        out.append(u * mask / (mask.mean() + eps if form == "study" else mask.mean().clamp(min=1e-3)))
    return out


def paper_lion(gs, hs, t, beta1=0.9, beta2=0.95):
    out = []
    for g, h in zip(gs, hs):
        m = h.get("m", torch.zeros_like(g))
        out.append(torch.sign(beta1 * m + (1 - beta1) * g))
        h["m"] = beta2 * m + (1 - beta2) * g
    return out


def paper_signum(gs, hs, t, beta1=0.98):
    for g, h in zip(gs, hs):
        h["m"] = beta1 * h.get("m", 0) + (1 - beta1) * g
    return [torch.sign(h["m"]) for h in hs]


def paper(optimizer, grads, lr=LR, wd=WD, **options):
    params, held = start(), [{} for _ in SHAPES]
    for t, gs in enumerate(grads, 1):
        for p, u in zip(params, optimizer(gs, held, t, **options)):
            p -= lr * (u + wd * p)
    return params


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=tolerance, atol=tolerance)


VARIANTS = [
    ("adamw", {}, paper_adamw, {}),
    ("adamw", {"beta1": 0.8, "eps": 1e-3}, paper_adamw, {"beta1": 0.8, "eps": 1e-3}),
    ("adamw", {"beta2": 0.5}, paper_adamw, {"beta2": 0.5}),
    ("nadamw", {}, paper_nadamw, {}),
    ("mars", {}, paper_mars, {}),
    ("mars", {"gamma": 0.1, "max_grad_norm": 0.0}, paper_mars, {"gamma": 0.1, "limit": 0}),
    ("mars", {"clip_scope": "matrix"}, paper_mars, {"scope": "matrix"}),
    ("cautious", {}, paper_cautious, {}),
    ("cautious", {"form": "authors"}, paper_cautious, {"form": "authors"}),
    ("lion", {}, paper_lion, {}),
    ("signum", {}, paper_signum, {}),
]  # fmt: skip


@pytest.mark.parametrize("name, options, optimizer, paper_options", VARIANTS)
def test_rules_are_the_papers(name, options, optimizer, paper_options):
    grads = gradients()
    assert_same(ours(name, options, grads), paper(optimizer, grads, **paper_options))


@pytest.mark.skipif(not native_available(), reason="the extension is not built")
@pytest.mark.parametrize("name, options, optimizer, paper_options", VARIANTS)
def test_native_fp32_stays_with_the_papers_float64(name, options, optimizer, paper_options):
    grads = [[g.float().double() for g in gs] for gs in gradients()]
    params = paper(optimizer, grads, **paper_options)
    close = ours(name, options, grads, torch.float32)
    for x, y in zip(close, params, strict=True):
        difference = (x.double() - y).norm() / y.norm()
        assert difference < 1e-6


@pytest.mark.parametrize("form", ["study", "authors"])
def test_sophia_is_the_papers(form):
    grads, estimates = gradients(), [[g.square() for g in gs] for gs in gradients(seed=5)]
    beta1, beta2, gamma, eps = 0.95, 0.9, 0.0125, 1e-7
    params, m, h = start(), [0.0] * len(SHAPES), [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for t, gs in enumerate(grads, 1):
        for i, g in enumerate(gs):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            estimate = m[i] / (1 - beta1**t) if form == "study" else m[i]
            u = (estimate / (gamma * h[i]).clamp(min=eps)).clamp(-1, 1)
            params[i] -= LR * (u + WD * params[i])
            if t <= 10:
                assert torch.equal(u, torch.sign(m[i]))  # no curvature yet
            if t % 10 == 0:
                h[i] = beta2 * h[i] + (1 - beta2) * estimates[t - 1][i]
    assert_same(ours("sophia", {"form": form}, grads, curvature=estimates), params)
    near = ours("sophia", {"form": form}, grads, torch.float32, curvature=estimates)
    assert_same(near, params, 2e-6)


def test_sophias_curvature_from_squared_gradients():
    optimizer = registry.build("sophia", {})
    state = optimizer.init_state(torch.zeros(4))
    optimizer.update_curvature([state], [torch.tensor([1.0, -2.0, 0.0, 3.0])], scale=5.0, squared=True)
    torch.testing.assert_close(state["hessian"], 0.1 * 5.0 * torch.tensor([1.0, 4.0, 0.0, 9.0]))


# Peers.
def peer(factory, grads, dtype=torch.float64):
    params = [torch.nn.Parameter(p) for p in start(dtype)]
    optimizer = factory(params)
    for gs in grads:
        for p, g in zip(params, gs):
            p.grad = g.to(dtype).clone()
        optimizer.step()
    return [p.detach() for p in params]


def torch_adamw(params):
    return torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.98), eps=1e-10, weight_decay=WD)


def torch_nadam(params):
    return torch.optim.NAdam(params, lr=LR, betas=(0.95, 0.98), eps=1e-10, weight_decay=WD, decoupled_weight_decay=True)


@pytest.mark.parametrize(
    "name, options, factory", [("adamw", {}, torch_adamw), ("nadamw", {"form": "torch"}, torch_nadam)]
)
def test_torch_agrees(name, options, factory):
    grads = gradients()
    assert_same(ours(name, options, grads), peer(factory, grads), 1e-8)  # NAdam keeps its product of μ in fp32
    single = [[g.float() for g in gs] for gs in grads]
    assert_same(ours(name, options, single, torch.float32), peer(factory, single, torch.float32), 2e-6)


def lion_of_lion_pytorch(params):
    return importlib.import_module("lion_pytorch").Lion(params, lr=LR, betas=(0.9, 0.95), weight_decay=WD)


def lion_of_pytorch_optimizer(params):
    module = importlib.import_module("pytorch_optimizer")
    return module.Lion(params, lr=LR, betas=(0.9, 0.95), weight_decay=WD, weight_decouple=True)


def mars_of_pytorch_optimizer(params):
    """Its clip is per tensor; it corrects by the previous gradient as we do, but starts with c_1 = g_1.

    It adds 1e-15 below the root, and ε before the second moment's bias correction: gradients away from 0
    keep both out of sight.
    """
    module = importlib.import_module("pytorch_optimizer")
    return module.MARS(
        params, lr=LR, betas=(0.95, 0.98), gamma=0.025, eps=1e-14, weight_decay=WD, weight_decouple=True,
        optimize_1d=True, mars_type="adamw",
    )  # fmt: skip


@pytest.mark.parametrize("factory", [lion_of_lion_pytorch, lion_of_pytorch_optimizer])
def test_peers_lion_agrees(factory):
    pytest.importorskip(factory.__name__.removeprefix("lion_of_"))
    grads = gradients()
    assert_same(ours("lion", {}, grads), peer(factory, grads), 1e-9)


def test_peers_mars_differs_only_by_its_first_step():
    pytest.importorskip("pytorch_optimizer")
    grads = [[g.sign() + 0.1 * g for g in gs] for gs in gradients()]
    theirs = peer(mars_of_pytorch_optimizer, grads)
    options = {"clip_scope": "matrix", "eps": 1e-14}
    optimizer = registry.build("mars", options)
    params = start()
    states = [optimizer.init_state(p) for p in params]
    for state, g in zip(states, grads[0]):
        state["prev_grad"].copy_(g)  # so that c_1 = g_1
    for t, gs in enumerate(grads, 1):
        optimizer.update(params, [g.clone() for g in gs], states, t, LR, WD)
    assert_same(params, theirs, 1e-9)


# What every rule keeps.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_a_zero_gradient_only_decays(name, dtype):
    optimizer, params = registry.build(name, {}), start(dtype)
    states = [optimizer.init_state(p) for p in params]
    optimizer.update(params, [torch.zeros_like(p) for p in params], states, 1, 0.5, 0.5)
    assert_same(params, [0.75 * p for p in start(dtype)], 1e-7)


@pytest.mark.parametrize("name", RULES)
def test_a_learning_rate_of_zero_moves_nothing_but_states(name):
    optimizer, params = registry.build(name, {}), start(torch.float32)
    states = [optimizer.init_state(p) for p in params]
    optimizer.update(params, gradients(1, torch.float32)[0], states, 1, 0.0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(params, start(torch.float32)))
    assert all(any(value.any() for value in state.values()) for state in states)


@pytest.mark.parametrize("name", RULES)
def test_gradient_scale_is_a_scaled_gradient(name):
    grads = gradients(10)
    scaled = [[0.25 * g for g in gs] for gs in grads]
    assert_same(ours(name, {}, grads, grad_scale=0.25), ours(name, {}, scaled), 1e-12)


def test_decay_modes():
    grads = gradients(3)
    base = start()
    for mode in ("decoupled", "independent", "cautious"):
        optimizer, params = registry.build("lion", {}), start()
        states = [optimizer.init_state(p) for p in params]
        optimizer.update(params, grads[0], states, 1, 0.01, 0.1, decay_mode=mode)
        for p, p0, g in zip(params, base, grads[0]):
            u = torch.sign(g)
            decay = {"decoupled": 0.001 * p0, "independent": 0.1 * p0, "cautious": 0.001 * p0 * (u * p0 >= 0)}
            torch.testing.assert_close(p, p0 - 0.01 * u - decay[mode], rtol=1e-12, atol=0)
    with pytest.raises(UserError, match="no decay mode 'coupled'"):
        optimizer.update(params, grads[0], states, 1, 0.01, 0.1, decay_mode="coupled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_flat_pieces_with_a_reducer_equal_whole_tensors(name, dtype):
    """Two ranks, each with a half of every tensor; the reducer adds what they would all-reduce."""
    grads = gradients(6, dtype)
    whole = ours(name, {}, grads, dtype)
    optimizer = registry.build(name, {})
    halves = [[half.clone() for p in start(dtype) for half in p.view(-1).chunk(2)]]
    pieces = halves[0]
    numel = [n for p in start(dtype) for n in [p.numel()] * len(p.view(-1).chunk(2))]
    owner = torch.tensor([i for i, p in enumerate(start(dtype)) for _ in p.view(-1).chunk(2)])

    def per_matrix(values):
        return torch.zeros(len(SHAPES), dtype=values.dtype).index_add(0, owner, values)[owner]

    reducer = Reducer(numel, per_matrix)
    states = [optimizer.init_state(p) for p in pieces]
    for t, gs in enumerate(grads, 1):
        cut = [half.clone() for g in gs for half in g.view(-1).chunk(2)]
        optimizer.update(pieces, cut, states, t, LR, WD, reducer)
    joined = [torch.cat([p for p, o in zip(pieces, owner) if o == i]).view(s) for i, s in enumerate(SHAPES)]
    assert_same(joined, whole, 1e-12 if name != "mars" or dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", RULES)
def test_resuming_from_a_copied_state_repeats_every_bit(name):
    grads = gradients(8, torch.float32)
    optimizer, params = registry.build(name, {}), start(torch.float32)
    states = [optimizer.init_state(p) for p in params]
    for t, gs in enumerate(grads, 1):
        if t == 5:
            saved = [p.clone() for p in params], [{k: v.clone() for k, v in s.items()} for s in states]
            numbers = dict(optimizer.numbers)
        optimizer.update(params, [g.clone() for g in gs], states, t, LR, WD)
    again, resumed = registry.build(name, {}), saved
    again.numbers = numbers
    for t, gs in list(enumerate(grads, 1))[4:]:
        again.update(resumed[0], [g.clone() for g in gs], resumed[1], t, LR, WD)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed[0]))


QUADRATIC = [(name, {}) for name in RULES] + [(n, {"state_dtype": kind}) for n in NARROW for kind in ("bf16", "int8")]


@pytest.mark.parametrize("name, options", QUADRATIC)
def test_a_quadratic_converges(name, options):
    """½‖W − T‖² from 0, noisy gradients, learning rate to 0: whatever the precision of the state."""
    optimizer, generator = registry.build(name, options), torch.Generator().manual_seed(3)
    target = torch.randn(50, 60, generator=generator)
    params = [torch.zeros(50, 60)]
    states = [optimizer.init_state(params[0])]
    steps = 400
    for t in range(1, steps + 1):
        noise = 0.1 * torch.randn(50, 60, generator=generator)
        rate = 0.05 * (1.0 if optimizer.own_schedule else 1 - t / steps)
        optimizer.update(params, [params[0] - target + noise], states, t, rate, 0.0)
        if name == "sophia" and optimizer.curvature_due(t):
            optimizer.update_curvature(states, [torch.full((50, 60), 1.0)])
    actual = params[0] - states[0][optimizer.lead_key] if optimizer.lead_key else params[0]
    assert (actual - target).norm() / target.norm() < 0.05


def test_copies_are_the_parameters_in_bf16():
    optimizer, params = registry.build("adamw", {}), start(torch.float32)
    copies = [torch.empty(p.shape, dtype=torch.bfloat16) for p in params]
    states = [optimizer.init_state(p) for p in params]
    optimizer.update(params, gradients(1, torch.float32)[0], states, 1, LR, WD, copies=copies)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, params))


def test_bf16_parameters_learn_small_steps_only_when_rounded_stochastically():
    """A step of 1e-3 on a weight of 1 is below half a bf16 unit: rounding to nearest stands still."""
    ends = {}
    for rounding in ("nearest", "stochastic"):
        optimizer = registry.build("lion", {"rounding": rounding})
        params = [torch.ones(10_000, dtype=torch.bfloat16)]
        states = [optimizer.init_state(params[0])]
        for t in range(1, 101):
            optimizer.update(params, [torch.ones(10_000)], states, t, 1e-3, 0.0)
        ends[rounding] = params[0].float().mean().item()
    assert ends["nearest"] == 1.0 and ends["stochastic"] == pytest.approx(0.9, abs=2e-3)


def test_cost_counts_bytes():
    cost = {name: registry.build(name, {}).cost(10) for name in RULES}
    moved = {"adamw": 28, "nadamw": 28, "mars": 44, "cautious": 36, "lion": 20, "signum": 20, "sophia": 24,
             "ademamix": 120, "adopt": 96, "schedule_free": 136}  # fmt: skip
    assert {name: c.elementwise_bytes / 10 for name, c in cost.items()} == moved
    held = {"adamw": 8, "nadamw": 8, "mars": 12, "cautious": 8, "lion": 4, "signum": 4, "sophia": 8, "ademamix": 12,
            "adopt": 8, "schedule_free": 8}  # fmt: skip
    assert {name: c.state_bytes / 10 for name, c in cost.items()} == held
    assert registry.build("adamw", {"state_dtype": "bf16"}).cost(10).state_bytes == 40
    optimizer = registry.build("adamw", {"state_dtype": "int8"})
    real = sum(t.nbytes for t in optimizer.init_state(torch.zeros(4096)).values())
    assert optimizer.cost(4096).state_bytes == real


def test_options_out_of_range_are_refused():
    for name, options in (
        ("adamw", {"beta1": 1.0}), ("adamw", {"eps": 0.0}), ("lion", {"beta2": -0.1}),
        ("adamw", {"state_dtype": "fp8"}), ("mars", {"clip_scope": "tensor"}), ("nadamw", {"form": "optax"}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--{name}-{next(iter(options))}".replace("_", "-")):
            registry.build(name, options)
