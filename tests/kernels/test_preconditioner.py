"""Kronecker factors against explicit matrices, their invariants, the norm's bound, and matrix roots."""

import pytest
import torch

from megatron_opt.kernels import preconditioner as pc
from megatron_opt.kernels import products


def triangular(batch, size):
    return torch.eye(size, dtype=torch.float64) + 0.3 * torch.randn(batch, size, size, dtype=torch.float64).triu()


def dense(factor, block):
    return torch.diag(factor[block]) if factor.ndim == 2 else factor[block]


@pytest.mark.parametrize("diagonal", [(False, False), (True, False), (False, True), (True, True)])
def test_products_are_the_explicit_ones(diagonal):
    torch.manual_seed(0)
    sizes = (5, 7)
    factors = {
        side: torch.rand(3, sizes[side], dtype=torch.float64) + 0.5 if flat else triangular(3, sizes[side])
        for side, flat in enumerate(diagonal)
    }
    x = torch.randn(3, *sizes, dtype=torch.float64)
    white, back, whole = pc.whiten(x, factors), pc._unwhiten(x, factors), pc.precondition(x, factors)
    for b in range(3):
        q0, q1 = dense(factors[0], b), dense(factors[1], b)
        torch.testing.assert_close(white[b], q0 @ x[b] @ q1.T)
        torch.testing.assert_close(back[b], torch.linalg.inv(q0).T @ x[b] @ torch.linalg.inv(q1))
        torch.testing.assert_close(whole[b], q0.T @ q0 @ x[b] @ q1.T @ q1)


def test_updates_keep_triangles_and_stop_at_the_fixed_point():
    """Where A and B have the same moments nothing moves: Q = I, and gradient equal to the noise."""
    torch.manual_seed(0)
    factors = {0: triangular(2, 4), 1: torch.rand(2, 6, dtype=torch.float64) + 0.5}
    g, v = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    pc.triangular_update(factors, g, v, 0.1)
    assert not factors[0].tril(-1).any() and bool((factors[1] > 0).all())
    still = {0: torch.eye(4, dtype=torch.float64).repeat(2, 1, 1), 1: torch.ones(2, 6, dtype=torch.float64)}
    pc.triangular_update(still, v, v, 0.1)
    torch.testing.assert_close(still[0], torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))
    torch.testing.assert_close(still[1], torch.ones(2, 6, dtype=torch.float64))


def test_balance_equalizes_and_keeps_the_preconditioner():
    torch.manual_seed(0)
    factors = {0: 100 * triangular(3, 4), 1: 0.01 * triangular(3, 5)}
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    before = pc.precondition(x, factors)
    pc.balance(factors)
    torch.testing.assert_close(pc.precondition(x, factors), before)
    a, b = (q.abs().amax((-2, -1)) for q in factors.values())
    torch.testing.assert_close(a, b)


def test_norm_bound_is_a_tight_lower_bound():
    torch.manual_seed(0)
    for _ in range(50):
        x = torch.randn(7, 20, 12, dtype=torch.float64)
        for a in (x @ x.mT, x[:, :12] - x[:, :12].mT):
            exact = torch.linalg.matrix_norm(a, 2)
            bound = pc.norm_bound(a)
            assert bool((bound <= exact * (1 + 1e-12)).all()) and bool((exact <= 2**0.5 * bound).all())
    assert not pc.norm_bound(torch.zeros(2, 3, 3)).any()


def test_rotation_to_symmetric_nears_the_polar_factor():
    """Steps of exp(aR) keep QᵀQ to second order and lead to a symmetric Q."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, dtype=torch.float64))[0]
    spd = x @ x.mT / 6 + torch.eye(6, dtype=torch.float64)
    q = turn @ spd
    product = q.mT @ q
    for _ in range(300):
        q = pc._rotate_to_symmetric(q, 0.05)
    assert float((q - q.mT).norm() / q.norm()) < 1e-3
    assert float((q.mT @ q - product).norm() / product.norm()) < 0.05


@pytest.mark.parametrize("order", [2, 4])
def test_newton_and_eigh_roots_agree(order):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 40, dtype=torch.float64) * torch.logspace(0, -1, 20, dtype=torch.float64)[:, None]
    a = x @ x.mT
    values, vectors = torch.linalg.eigh(a)
    exact = vectors * values.unsqueeze(-2) ** (-1.0 / order) @ vectors.mT
    actual = pc.inverse_root_newton(a, order, 1e-12)
    assert float((actual - exact).norm() / exact.norm()) < 1e-6
    assert float((pc.inverse_root_eigh(a, order, 1e-14) - exact).norm() / exact.norm()) < 1e-6
    single = pc.inverse_root_newton(a.float(), order, 1e-6)
    assert float((single.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("root", [pc.inverse_root_eigh, pc.inverse_root_newton])
def test_root_of_zero_is_zero(root):
    a = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    found = root(a, 4, 1e-6)
    assert not found[0].any()
    torch.testing.assert_close(found[1], torch.eye(4), rtol=1e-4, atol=1e-4)


KRON_SHAPES = [(64, 64), (3, 33, 20), (1, 1), (100, 12), (2, 65, 96), (200, 130)]


def kron_lists(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = [(*shape[:-2], shape[-2], shape[-1]) for shape in KRON_SHAPES]
    factors = [
        [
            (torch.eye(size[side], dtype=torch.float64) + 0.1 * draw(*size[:-2], size[side], size[side]).triu())
            for size in sizes
        ]
        for side in (-2, -1)
    ]
    factors = [[q.expand(1, *q.shape[-2:]).contiguous() if q.ndim == 2 else q for q in several] for several in factors]
    lists = (*factors, [draw(*size) for size in sizes], [draw(*size) for size in sizes])
    return [[x.to(dtype) for x in several] for several in lists]


def kron_step(lists, learns):
    noises, dampings = (lists[3], [0.01 * (1 + i) for i in range(len(lists[3]))]) if learns else ([], [])
    step = pc._kron_step if lists[0][0].dtype == torch.float64 else pc.kron_step
    step(*lists[:3], noises, dampings, 0.2)
    return lists


native = pytest.mark.skipif(not products.available(torch.zeros(1)), reason="no extension, or no AVX-512 here")


@native
@pytest.mark.parametrize("learns", [True, False])
def test_steps_of_lists_are_float64s(learns):
    ours, exact = kron_step(kron_lists(), learns), kron_step(kron_lists(dtype=torch.float64), learns)
    before = kron_lists()
    for which, (several, theirs) in enumerate(zip(ours, exact)):
        for x, y, old in zip(several, theirs, before[which]):
            torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=2e-4 * float(y.abs().max()))
            if which < 2:
                assert torch.equal(x, x.triu()) and torch.equal(x, old) == (not learns)


@native
def test_steps_of_lists_do_not_depend_on_threads_or_on_each_other(set_threads):
    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(kron_step(kron_lists(), True))
        alone = []
        for i in range(len(KRON_SHAPES)):
            lists = [several[i : i + 1] for several in kron_lists()]
            pc.kron_step(*lists[:3], lists[3], [0.01 * (1 + i)], 0.2)
            alone.append(lists)
        results.append([[one[which][0] for one in alone] for which in range(4)])
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True))


@native
def test_steps_of_lists_refuse_what_does_not_fit():
    lefts, rights, moments, noises = kron_lists()
    with pytest.raises(RuntimeError, match="right must be contiguous"):
        pc.kron_step(lefts, rights[::-1], moments, [], [], 0.1)
    with pytest.raises(RuntimeError, match="equally long"):
        pc.kron_step(lefts, rights, moments, noises, [0.1], 0.1)
    with pytest.raises(RuntimeError, match="noise must have the shapes"):
        pc.kron_step(lefts, rights, moments, noises[::-1], [0.1] * len(noises), 0.1)
