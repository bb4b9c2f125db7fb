"""Kronecker factors against explicit matrices, their invariants, the norm's bound, and matrix roots."""

import pytest
import torch

from megatron_opt.kernels import preconditioner as pc


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
    found = pc.inverse_root_newton(a, order, 1e-12)
    assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert float((pc.inverse_root_eigh(a, order, 1e-14) - exact).norm() / exact.norm()) < 1e-6
    single = pc.inverse_root_newton(a.float(), order, 1e-6)
    assert float((single.double() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("root", [pc.inverse_root_eigh, pc.inverse_root_newton])
def test_root_of_zero_is_zero(root):
    a = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    found = root(a, 4, 1e-6)
    assert not found[0].any()
    torch.testing.assert_close(found[1], torch.eye(4), rtol=1e-4, atol=1e-4)
