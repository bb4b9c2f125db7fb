"""Bases: orthonormal at any rank, the decomposition's where it is unique, and smooth where it is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.kernels import eigenbasis as eb


def orthonormal(q, tolerance=1e-12):
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return float((q.mT @ q - eye).abs().max()) < tolerance


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 10**6), st.booleans())
def test_complete_is_orthonormal_and_keeps_the_qr(size, rank, batch, seed, single):
    rank = min(rank, size)
    dtype = torch.float32 if single else torch.float64
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, size, rank, dtype=dtype, generator=generator)
    q = eb.complete(x)
    assert orthonormal(q, 1e-5 if single else 1e-12)
    r = q[..., :rank].mT @ x
    assert float(r.tril(-1).abs().max()) < (1e-4 if single else 1e-11)
    assert bool((r.diagonal(dim1=-2, dim2=-1) > 0).all())


def test_complete_of_nothing_is_the_identity():
    assert torch.equal(eb.complete(torch.zeros(2, 5, 3)), torch.eye(5).repeat(2, 1, 1))


def test_columns_of_rounding_are_filled_like_the_null_space():
    """A repeated column's residual is rounding; two roundings of it give the same basis."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, 4)
    x = torch.cat([x, x[..., :1] * (1 + 1e-7 * torch.randn(1, 9, 1)), torch.randn(1, 9, 1)], -1)
    y = x.clone()
    y[..., 4] = x[..., 0] * (1 + 1e-7 * torch.randn(1, 9))
    a, b = eb.complete(x), eb.complete(y)
    assert orthonormal(a, 1e-5) and float((a - b).abs().max()) < 1e-5


@pytest.mark.parametrize("size, rank", [(20, 8), (64, 16), (256, 64), (96, 1)])
def test_null_space_is_smooth_in_the_range(size, rank):
    """A perturbation of 1e-7 moves the completion by little more, where a decomposition's would turn at will."""
    torch.manual_seed(0)
    x = torch.randn(1, size, rank, dtype=torch.float64)
    a, b = eb.complete(x), eb.complete(x + 1e-7 * torch.randn_like(x))
    assert float((a - b).norm()) < 1e-4


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1)])
def test_first_bases_are_the_singular_vectors(shape):
    torch.manual_seed(0)
    g = torch.randn(2, *shape, dtype=torch.float64)
    left, right = eb.first_bases(g, (0, 1))
    assert orthonormal(left) and orthonormal(right)
    k = min(shape)
    middle = left.mT @ g @ right
    values = torch.linalg.svdvals(g)
    expected = torch.zeros_like(middle)
    expected.diagonal(dim1=-2, dim2=-1)[..., :k] = values
    torch.testing.assert_close(middle.abs(), expected, rtol=1e-7, atol=1e-9)
    (alone,) = eb.first_bases(g, (1,))
    assert torch.equal(alone, right)


def test_first_basis_of_a_factor_is_that_of_its_gradient():
    torch.manual_seed(0)
    g = torch.randn(1, 6, 20)
    (expected,) = eb.first_bases(g, (0,))
    actual = eb.first_basis_of_factor(g.double() @ g.double().mT, 6)
    assert float((actual - expected).abs().max()) < 1e-6


def test_signs_do_not_follow_the_decomposition(monkeypatch):
    torch.manual_seed(0)
    g = torch.randn(1, 6, 9, dtype=torch.float64)
    expected = eb.first_bases(g, (0, 1))
    plain = torch.linalg.eigh

    def flipped(a):
        values, vectors = plain(a)
        return torch.return_types.linalg_eigh((values, -vectors))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    for a, b in zip(expected, eb.first_bases(g, (0, 1))):
        torch.testing.assert_close(a, b)


def test_power_steps_converge_to_sorted_eigenvectors():
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    values = torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)
    a = (u * values @ u.T)[None]
    q = torch.linalg.qr(torch.randn(1, 8, 8, dtype=torch.float64))[0]
    for _ in range(300):
        q, order = eb.power_step(a, q, 8)
        assert sorted(order[0].tolist()) == list(range(8)) and orthonormal(q)
    torch.testing.assert_close((q.mT @ a @ q)[0], torch.diag(values), rtol=1e-8, atol=1e-8)
    assert order[0].tolist() == list(range(8))


def test_power_step_sorts_before_it_iterates():
    a = torch.diag(torch.tensor([1.0, 3.0, 2.0]))[None]
    q, order = eb.power_step(a, torch.eye(3)[None], 3)
    assert order.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(q[0], torch.eye(3)[:, [1, 2, 0]])


def test_columns_beyond_the_rank_keep_their_order():
    torch.manual_seed(0)
    g = torch.randn(10, 2, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(1, 10, 10, dtype=torch.float64))[0]
    _, order = eb.power_step((g @ g.T)[None], q, 2)
    rest = order[0, 2:].tolist()
    assert rest == sorted(rest)


def test_rows_of_zeros_keep_their_unit_vectors():
    """A token that was never seen: no rounding of other rows reaches it, in the first basis or later."""
    torch.manual_seed(0)
    dead = [0, 3, 7]
    g = torch.randn(1, 9, 4)
    g[:, dead] = 0.0
    (q,) = eb.first_bases(g, (0,))
    for _ in range(3):
        for row in dead:
            (column,) = q[0, row].nonzero().flatten().tolist()
            assert q[0, row, column] == 1.0 and q[0, :, column].count_nonzero() == 1
        q, _ = eb.power_step(g @ g.mT, q, 4)


def test_shifted_steps_have_the_same_eigenvectors():
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    a = (u * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64) @ u.T)[None]
    q = torch.eye(5, dtype=torch.float64)[None]
    for _ in range(400):
        q, _ = eb.power_step(a, q, 5, shift=0.1)
    torch.testing.assert_close((q[0].T @ u).abs(), torch.eye(5, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_rotation_measures_the_off_diagonal():
    torch.manual_seed(0)
    x = torch.randn(3, 12, 30, dtype=torch.float64)
    a = x @ x.mT
    vectors = torch.linalg.eigh(a).eigenvectors
    every = torch.arange(12)
    assert float(eb.rotation(a, vectors, every).max()) < 1e-7
    q = torch.linalg.qr(torch.randn(3, 12, 12, dtype=torch.float64))[0]
    middle = q.mT @ a @ q
    off = middle - torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1))
    exact = off.flatten(1).norm(dim=1) / middle.flatten(1).norm(dim=1)
    torch.testing.assert_close(eb.rotation(a, q, every), exact)
    assert float((eb.rotation(a, q, every[::3]) / exact - 1).abs().max()) < 0.5
