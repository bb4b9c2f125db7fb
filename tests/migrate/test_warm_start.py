"""The mathematics of warm starts: scales, rotations, round trips."""

from typing import Any

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.kernels import preconditioner
from megatron_opt.migrate import warm_start
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from tests.optimizers.slicing import step_together

INFO = MatrixInfo("w", (12, 20))


def moments(seed: int = 0, shape: tuple[int, ...] = INFO.shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(shape, generator=generator) * 0.1
    return m, m.square() + torch.rand(shape, generator=generator)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "momentum_form": "ema"}])
def test_muons_momentum_is_what_it_would_be_under_the_same_gradients(options: dict) -> None:
    """Under a constant gradient AdamW's m is that gradient; Muon's own steps lead to the same buffer as the fill."""
    optimizer = registry.build("muon", options)
    g = torch.randn(INFO.shape, generator=torch.Generator().manual_seed(1))
    stepped = optimizer.init_state(torch.zeros(INFO.shape), INFO)
    for step in range(1, 300):
        optimizer.update([g.clone()], [stepped], step, [INFO])
    filled = optimizer.init_state(torch.zeros(INFO.shape), INFO)
    warm_start.fill_matrix(optimizer, INFO, filled, g, g.square())
    torch.testing.assert_close(filled["momentum_buffer"], stepped["momentum_buffer"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("muon", 1e-6),
        ("scion", 1e-6),
        ("soap", 1e-4),
        ("muon_h", 1e-6),
        ("adam_h", 0),
        ("shampoo", 0),
        ("adam_mini", 0),
    ],
)
def test_first_moments_return_as_they_went(name: str, tolerance: float) -> None:
    optimizer = registry.build(name, {"block_size": 8} if name in ("soap", "shampoo") else {})
    state = optimizer.init_state(torch.ones(INFO.shape), INFO)
    m, v = moments()
    warm_start.fill_matrix(optimizer, INFO, state, m, v)
    back, second = warm_start.moments_of_matrix(optimizer, INFO, state)
    torch.testing.assert_close(back, m, rtol=tolerance, atol=tolerance / 10)
    assert second.shape == v.shape and bool((second >= 0).all())


def warm_soap(m: torch.Tensor, v: torch.Tensor, **options: object) -> tuple[Any, dict[str, torch.Tensor]]:
    """A rule, and the state of a start from these moments."""
    optimizer = registry.build("soap", {"block_size": 0, **options})
    state = optimizer.init_state(torch.zeros(INFO.shape), INFO)
    warm_start.fill_matrix(optimizer, INFO, state, m, v)
    return optimizer, state


def test_a_warm_soap_takes_the_first_gradients_bases_and_turns_adams_moments() -> None:
    """Second moments against squares of gradients drawn with Adam's mean and variance, in those bases."""
    m, v = moments(2)
    optimizer, state = warm_soap(m, v)
    generator = torch.Generator().manual_seed(3)
    draws = m + (v - m.square()).sqrt() * torch.randn(40000, *INFO.shape, generator=generator)
    gradient = draws[0]
    assert float(optimizer.update([gradient.clone()], [state], 1001, [INFO])[0].norm()) == 0
    left, right = state["q_0_0"][0], state["q_0_1"][0]
    for basis, outer, factor in ((left, gradient @ gradient.mT, "gg_0_0"), (right, gradient.mT @ gradient, "gg_0_1")):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis)), rtol=0, atol=1e-5)
        inside = basis.mT @ state[factor][0] @ basis
        torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-4)
        assert float((state[factor][0] - 0.05 * outer).norm()) < 0.1 * float(
            (0.05 * outer).norm()
        )  # default beta: 0.95
    rotated = (left.mT @ draws @ right).square().mean(0)
    torch.testing.assert_close(rotated, state["exp_avg_sq"], rtol=0.06, atol=0.01)
    torch.testing.assert_close(left @ state["exp_avg"] @ right.mT, m, rtol=1e-4, atol=1e-6)
    assert state["ready"].item() == 1
    back, _ = warm_start.moments_of_matrix(optimizer, INFO, state)
    torch.testing.assert_close(back, m, rtol=1e-4, atol=1e-5)


def test_a_warm_soap_moves_from_its_second_step_and_by_adams_size() -> None:
    m, v = moments(4)
    optimizer, state = warm_soap(m, v)
    optimizer.update([m.clone()], [state], 1001, [INFO])
    (u,) = optimizer.update([m.clone()], [state], 1002, [INFO])
    adam = m / v.sqrt()
    assert 0.5 < float(u.norm() / adam.norm()) < 2.0
    assert float((u * adam).sum() / (u.norm() * adam.norm())) > 0.8  # the bases are the gradient's own


def test_a_warm_soap_waits_for_a_gradient() -> None:
    m, v = moments(8)
    optimizer, state = warm_soap(m, v)
    before = {key: value.clone() for key, value in state.items()}
    assert float(optimizer.update([torch.zeros(INFO.shape)], [state], 1001, [INFO])[0].norm()) == 0
    assert all(torch.equal(state[key], value) for key, value in before.items())


def test_a_warm_soap_in_slices_is_the_whole() -> None:
    m, v = (x.double() for x in moments(9))
    optimizer = registry.build("soap", {"block_size": 0, "max_precond_dim": min(INFO.shape)})
    partition = optimizer.partition(INFO)
    assert partition is not None and partition.shard_dim is not None
    dim = partition.shard_dim
    edges = (0, INFO.shape[dim] // 3, INFO.shape[dim])
    sizes = [edges[1], edges[2] - edges[1]]
    whole = optimizer.init_state(torch.zeros(INFO.shape, dtype=torch.float64), INFO)
    warm_start.fill_matrix(optimizer, INFO, whole, m, v)
    shared = {key: whole[key].clone() for key in partition.init_shared(m.device, m.dtype)}
    flag = {"ready": [whole["ready"]] * 2}  # with every shard
    parts = {key: whole[key].split(sizes, dim) for key in set(whole) - set(shared) - set(flag)} | flag
    slices = [{key: cut[index].clone() for key, cut in parts.items()} for index in range(2)]
    gradients = [torch.zeros_like(m), *moments(10)[:1], *moments(11)[:1], *moments(12)[:1]]
    for step, gradient in enumerate((g.double() for g in gradients), 1001):
        (expected,) = optimizer.update([gradient.clone()], [whole], step, [INFO])
        given = [part.clone() for part in gradient.split(sizes, dim)]
        actual = torch.cat(step_together(partition, given, slices, shared, step, edges), dim)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    assert float(expected.norm()) > 0


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
        optimizer = registry.build(name, {})
        state = optimizer.init_state(torch.zeros(50))
        warm_start.fill_elements(optimizer, state, m, v)
        assert len(state) == keys and torch.equal(state["exp_avg"], m)
        assert "exp_avg_sq" not in state or torch.equal(state["exp_avg_sq"], v)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_narrow_momentum_holds_the_same_values(dtype: str) -> None:
    info = MatrixInfo("w", (40, 80))
    optimizer = registry.build("muon", {"momentum_dtype": dtype})
    state = optimizer.init_state(torch.zeros(info.shape), info)
    m, v = moments(7, info.shape)
    warm_start.fill_matrix(optimizer, info, state, m, v)
    back, _ = warm_start.moments_of_matrix(optimizer, info, state)
    torch.testing.assert_close(back, m, rtol=2**-8, atol=float(m.abs().max()) / 250)


@pytest.mark.parametrize("grafting", ["adam", "none"])
def test_a_warm_shampoo_has_the_factors_of_drawn_gradients_and_steps_at_once(grafting: str) -> None:
    optimizer = registry.build("shampoo", {"block_size": 0, "grafting": grafting})
    state = optimizer.init_state(torch.zeros(INFO.shape), INFO)
    m, _ = moments(8)
    rows, columns = torch.rand(12, 1) + 0.5, torch.rand(1, 20) + 0.5
    v = 40 * rows * columns  # rank one: the factors' diagonals say all of it
    warm_start.fill_matrix(optimizer, INFO, state, m, v)
    generator = torch.Generator().manual_seed(9)
    draws = m + (v - m.square()).sqrt() * torch.randn(20000, *INFO.shape, generator=generator)
    left, right = (draws @ draws.mT).mean(0), (draws.mT @ draws).mean(0)
    torch.testing.assert_close(left, state["gg_0_0"][0], rtol=0.05, atol=0.02 * float(left.max()))
    torch.testing.assert_close(right, state["gg_0_1"][0], rtol=0.05, atol=0.02 * float(right.max()))
    torch.testing.assert_close(warm_start.moments_of_matrix(optimizer, INFO, state)[1], v, rtol=1e-3, atol=0)
    (u,) = optimizer.update([m.clone()], [state], 1001, [INFO])

    def root(factor: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(factor.double())
        return (vectors * values**-0.25) @ vectors.mT

    reference = root(state["gg_0_0"][0]) @ m.double() @ root(state["gg_0_1"][0])
    assert float((u * reference).sum() / (u.norm() * reference.norm())) > 0.999


@pytest.mark.parametrize("role", ["q", "gate"])
def test_adam_minis_blocks_are_the_means_of_adams_squares(role: str) -> None:
    info = MatrixInfo("w", (12, 20), role=role, heads=3)
    optimizer = registry.build("adam_mini", {})
    state = optimizer.init_state(torch.zeros(info.shape), info)
    m, v = moments(10)
    warm_start.fill_matrix(optimizer, info, state, m, v)
    blocks = 3 if role == "q" else 12
    torch.testing.assert_close(state["exp_avg_sq"].flatten(), v.view(blocks, -1).mean(1))
    _, back = warm_start.moments_of_matrix(optimizer, info, state)
    torch.testing.assert_close(back.view(blocks, -1).mean(1), v.view(blocks, -1).mean(1))
    assert bool((back.view(blocks, -1).std(1) < 1e-6).all())


def test_sophias_curvature_is_the_hessian_of_a_regression_on_true_labels() -> None:
    """Logistic regression at its true weights: the Hessian's diagonal in closed form, Adam's v from gradients of batches."""
    generator = torch.Generator().manual_seed(11)
    size, tokens = 6, 64
    weights, scale = torch.randn(size, generator=generator), torch.linspace(0.3, 2.0, size)
    m, v = torch.zeros(size), torch.zeros(size)
    for _ in range(3000):
        x = scale * torch.randn(tokens, size, generator=generator)
        p = torch.sigmoid(x @ weights)
        g = ((p - torch.bernoulli(p, generator=generator)).unsqueeze(1) * x).mean(0)
        m.lerp_(g, 0.1)
        v.lerp_(g.square(), 0.002)
    x = scale * torch.randn(200000, size, generator=generator)
    p = torch.sigmoid(x @ weights)
    hessian = ((p * (1 - p)).unsqueeze(1) * x.square()).mean(0)
    optimizer = registry.build("sophia", {})
    state = optimizer.init_state(torch.zeros(size))
    warm_start.fill_elements(optimizer, state, m, v, tokens)
    torch.testing.assert_close(state["hessian"], hessian, rtol=0.2, atol=0)
    back, square = warm_start.moments_of_elements(optimizer, state, tokens)
    torch.testing.assert_close(back, m)
    torch.testing.assert_close(square, v)


@pytest.mark.parametrize("form", ["triangular", "procrustes"])
@pytest.mark.parametrize("shape", [(12, 20), (30,)])
def test_a_warm_kron_whitens_momentum(form: str, shape: tuple[int, ...]) -> None:
    """Variances of rows times columns: preconditioned momentum has unit variance everywhere, where Kron's own rule rests."""
    info = MatrixInfo("w", shape)
    optimizer = registry.build("kron", {"update_form": form, "block_size": 0})
    state = optimizer.init_state(torch.zeros(shape), info)
    generator = torch.Generator().manual_seed(12)
    rows = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.1
    v = rows * (torch.rand(1, shape[1], generator=generator) + 0.1) if len(shape) == 2 else rows
    warm_start.fill_matrix(optimizer, info, state, torch.zeros(shape), v)
    spread = (v / v.sum() * (1 - 0.95) / (1 + 0.95)).sqrt()
    draws = (spread * torch.randn(4000, *shape, generator=generator)).view(4000, shape[0], -1)
    factors = {side: state[f"q_0_{side}"].expand(4000, *state[f"q_0_{side}"].shape[1:]) for side in range(len(shape))}
    variance = preconditioner.precondition(draws, factors).square().mean(0)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0.15, atol=0)
    upper = form == "procrustes" or len(shape) == 1 or torch.equal(state["q_0_0"][0], state["q_0_0"][0].triu())
    assert upper


def test_a_warm_kron_goes_on_from_correlated_gradients() -> None:
    """Mean and noise: the first direction is of unit size and downhill."""
    optimizer = registry.build("kron", {})
    m, v = moments(13)
    state = optimizer.init_state(torch.zeros(INFO.shape), INFO)
    warm_start.fill_matrix(optimizer, INFO, state, m, v)
    generator = torch.Generator().manual_seed(14)
    g = m + (v - m.square()).sqrt() * torch.randn(INFO.shape, generator=generator)
    (u,) = optimizer.update([g], [state], 5001, [INFO])
    assert 0.5 < float(u.square().mean().sqrt()) <= 1.1 + 1e-6 and float((u * m).sum()) > 0


def test_what_has_no_way_is_refused_by_name() -> None:
    for name in ("soap", "kron", "sophia", "adam_mini", "shampoo", "adam_h", "muon_h"):
        warm_start.check(name, registry.build(name, {}))
    with pytest.raises(UserError, match="from kron is not possible"):
        warm_start.check("kron", registry.build("kron", {}), source=True)


def test_a_warmup_is_a_fortieth_of_what_is_left_within_bounds() -> None:
    assert [warm_start.rewarm_steps(left) for left in (0, 8, 30, 800, 40000)] == [20, 4, 15, 20, 1000]


def test_moments_travel_in_fp32_whatever_the_exchange_does():
    """As `migrate checkpoint` calls it where this project's optimizer is left; the whole conversion is a slow test."""
    from types import SimpleNamespace

    from megatron_opt.distributed.exchange import Exchange

    nothing = SimpleNamespace(scatter_out=[[]], scatter_in=[[]])
    Exchange(None, 0, 1, torch.bfloat16).scatter(nothing, {}, [], "first moments", torch.float32).finish()
