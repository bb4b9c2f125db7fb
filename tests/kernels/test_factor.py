"""Triangular operands and solves, Cholesky QR and the step in an eigenbasis: native against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.kernels import eigenbasis as eb
from megatron_opt.kernels import products, projection

native = pytest.mark.skipif(
    not products.available(torch.zeros(1)), reason="no extension, or no AVX-512 in this processor"
)
SIDES = st.sampled_from([1, 2, 11, 12, 13, 31, 32, 33, 65, 100])
SHAPES = ("lower", "upper")


def triangle(size, shape, batch=2, seed=0, transposed=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, size, size, generator=generator) / size**0.5
    x = (x.tril() if shape == "lower" else x.triu()) + 2 * torch.eye(size)
    return x.mT.contiguous().mT if transposed else x


def rectangle(batch, rows, columns, seed=0, transposed=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    if transposed:
        return scale * torch.randn(batch, columns, rows, generator=generator).mT
    return scale * torch.randn(batch, rows, columns, generator=generator)


def orthonormal_to(q):
    wide = q.double()
    return float((wide.mT @ wide - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max())


@native
@settings(max_examples=80, deadline=None)
@given(size=SIDES, other=SIDES, shape=st.sampled_from(SHAPES), flags=st.tuples(st.booleans(), st.booleans()))
def test_triangular_operands_give_the_full_product(size, other, shape, flags):
    q, x = triangle(size, shape, transposed=flags[0]), rectangle(2, size, other, 1, flags[1])
    exact = q.double() @ x.double()
    bound = 1e-6 * (q.double().abs() @ x.double().abs()) + 1e-12
    assert ((products.matmul(q, x, a_shape=shape) - exact).abs() <= bound).all()
    mirrored = "upper" if shape == "lower" else "lower"
    other_way = products.matmul(x.mT, q.mT, b_shape=mirrored)
    assert ((other_way - exact.mT).abs() <= bound.mT).all()
    both = products.matmul(q, q, a_shape=shape, b_shape=shape).double()
    torch.testing.assert_close(both, q.double() @ q.double(), rtol=1e-5, atol=1e-5)


@native
@settings(max_examples=80, deadline=None)
@given(size=SIDES, other=SIDES, flags=st.tuples(st.booleans(), st.booleans()),
       scale=st.sampled_from([1.0, 1e-30, 1e-41, 1e30]))  # fmt: skip
def test_solves_are_float64s(size, other, flags, scale):
    l, x = triangle(size, "lower", transposed=flags[0]), rectangle(2, size, other, 1, flags[1], scale)
    actual = products.solve_lower(l, x).double()
    exact = torch.linalg.solve_triangular(l.double(), x.double(), upper=False)
    bound = torch.linalg.inv(l.double()).abs() @ (l.double().abs() @ exact.abs())
    assert ((actual - exact).abs() <= 1e-6 * bound + 1e-44 * size).all()


@native
def test_solves_pass_over_what_lies_above_the_diagonal():
    l, x = triangle(40, "lower"), rectangle(2, 40, 7)
    spoilt = torch.where(torch.ones(40, 40).triu(1).bool(), float("nan"), l)
    assert torch.equal(products.solve_lower(spoilt, x), products.solve_lower(l, x))
    assert products.solve_lower(l[:0], x[:0]).shape == (0, 40, 7)
    with pytest.raises(RuntimeError, match="are no triangular systems"):
        torch.ops.megatron_opt.solve_lower(l, rectangle(2, 39, 7))


@native
@settings(max_examples=60, deadline=None)
@given(
    size=SIDES,
    batch=st.integers(1, 4),
    power=st.sampled_from([0.0, 0.5, 2.0]),
    scale=st.sampled_from([1.0, 1e-15, 1e12]),
)
def test_cholesky_qr_is_the_qr(size, batch, power, scale):
    """Columns of very different lengths, at mild angles: found, orthonormal, and Householder's up to rounding."""
    x = torch.eye(size) + 0.3 * rectangle(batch, size, size, 3) / size**0.5
    x = scale * x * torch.logspace(0, -power, size)
    q, found = eb.cholesky_qr(x)
    reference, found_too = eb._cholesky_qr.reference(x.double(), 1e-6)
    assert bool(found.all()) and bool(found_too.all())
    assert orthonormal_to(q) < 1e-6 * size**0.5 + 2e-6
    exact = eb.complete(x.double())
    assert float((q - exact).abs().max()) < 1e-4 and float((reference - exact).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_qr_gives_up_where_columns_depend_on_each_other(dtype):
    torch.manual_seed(0)
    good = torch.randn(20, 20, dtype=dtype) + 4 * torch.eye(20, dtype=dtype)
    twice, zero, small, broken = (good.clone() for _ in range(4))
    twice[:, 7] = twice[:, 3]
    zero[:, 5] = 0
    small[:, 19] *= 1e-7 if dtype == torch.float32 else 1e-16
    broken[2, 2] = float("nan")
    x = torch.stack([good, twice, zero, small, broken])
    _, found = eb.cholesky_qr(x)
    assert found.tolist() == [True, False, False, False, False]
    whole = eb.orthonormalize(x[:4])
    assert orthonormal_to(whole) < (5e-6 if dtype == torch.float32 else 1e-13)
    torch.testing.assert_close(whole[1:], eb.complete(x[1:4]))


@pytest.mark.parametrize("last", [1, 3, 9])
def test_last_columns_of_rounding_are_filled_as_if_they_were_zero(last):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    x[..., -last:] = x[..., :1] * (1 + 1e-17 * torch.randn(2, 12, last, dtype=torch.float64))
    zeroed = x.clone()
    zeroed[..., -last:] = 0
    torch.testing.assert_close(eb.complete(x), eb.complete(zeroed), rtol=0, atol=1e-13)


@native
def test_oblique_columns_take_a_second_pass():
    """Angles near the limit of one pass: still orthonormal to rounding."""
    torch.manual_seed(0)
    x = torch.ones(1, 64, 64) + 0.5 * torch.randn(1, 64, 64)
    q, found = eb.cholesky_qr(x)
    assert bool(found.all()) and orthonormal_to(q) < 2e-6


@pytest.mark.parametrize("size", [24, 96])
def test_bases_stay_orthonormal_over_a_thousand_steps(size):
    """Fresh gradients of a spread spectrum, a refresh every step; what one refresh leaves the next does not add to."""
    generator = torch.Generator().manual_seed(size)
    spread = torch.logspace(0, -1.5, size)
    g = torch.randn(1, size, size, generator=generator) * spread[:, None]
    factor, (basis,) = g @ g.mT, eb.first_bases(g, (0,))
    worst, by_products = 0.0, 0
    for step in range(1000):
        g = torch.randn(1, size, size, generator=generator) * spread[:, None]
        factor = 0.95 * factor + 0.05 * (g @ g.mT)
        basis, _ = eb.power_step(factor, basis, size)
        if step % 25 == 0 or step > 990:
            worst = max(worst, orthonormal_to(basis))
            by_products += int(eb.cholesky_qr(factor @ basis)[1].all())
    assert worst < 5e-6 and by_products > 40
    aligned = basis.mT @ factor @ basis
    off = aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))
    assert float(off.norm() / aligned.norm()) < 0.2


def step_of(dtype, arguments, sides, floor=0.0):
    grad, m, v, left, right = (x.to(dtype) for x in arguments)
    u, m, v = grad.clone(), m.clone(), v.clone()
    bases = ([left] if 0 in sides else [], [right] if 1 in sides else [])
    projection.project_adam([u], [m], [v], *bases, beta1=0.9, beta2=0.95, eps=1e-8, scale=0.7, floor=floor)
    return u, m, v


def problem(batch, rows, columns, scale=1.0):
    left, right = (torch.linalg.qr(rectangle(batch, n, n, 5 + n))[0].contiguous() for n in (rows, columns))
    v = (scale * rectangle(batch, rows, columns, 3)).square()
    return [
        rectangle(batch, rows, columns, 1, scale=scale),
        rectangle(batch, rows, columns, 2, scale=scale),
        v,
        left,
        right,
    ]


@native
@settings(max_examples=60, deadline=None)
@given(
    rows=SIDES,
    columns=SIDES,
    batch=st.sampled_from([1, 3]),
    sides=st.sampled_from([(), (0,), (1,), (0, 1)]),
    floor=st.sampled_from([0.0, 0.01, 0.9]),
)
def test_the_step_in_the_basis_is_float64s(rows, columns, batch, sides, floor):
    arguments = problem(batch, rows, columns)
    arguments[2] = arguments[2] + 0.1  # away from 0/0, where rounding decides
    both = (step_of(dtype, arguments, sides, floor) for dtype in (torch.float32, torch.float64))
    for ours, exact in zip(*both):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=2e-5)


@native
@pytest.mark.parametrize("scale", [1e-30, 1e15, 0.0])
def test_the_step_bears_huge_and_tiny_gradients(scale):
    """v = 0 for tiny ones (their squares vanish), as in the reference."""
    arguments = problem(2, 33, 20, scale)
    ours, lists = step_of(torch.float32, arguments, (0, 1)), [[x.clone()] for x in arguments]
    projection._step(*lists, [], [], 0.9, 0.95, 1e-8, 0.7, 0.0, 1.0, 0.0)
    exact = lists[0][0]
    torch.testing.assert_close(ours[0], exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@native
def test_the_step_works_in_the_rows_of_a_wider_matrix():
    torch.manual_seed(0)
    arguments = problem(1, 12, 20)
    wide = [torch.zeros(1, 12, 37) for _ in range(3)]
    for to, x in zip(wide, arguments):
        to[..., 5:25] = x
    parts = [x[..., 5:25] for x in wide]
    lists = [[x] for x in (*parts, *arguments[3:])]
    projection.project_adam(*lists, beta1=0.9, beta2=0.95, eps=1e-8, scale=0.7)
    expected = step_of(torch.float32, arguments, (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(parts, expected))
    assert not any(x[..., :5].any() or x[..., 25:].any() for x in wide)
    settings = ([], [], 0.9, 0.9, 1.0, 1.0, 0.0, 1.0, 0.0)
    torch.ops.megatron_opt.project_adam(*[[torch.zeros(0, 4, 5)]] * 3, [], [], *settings)
    torch.ops.megatron_opt.project_adam([], [], [], [], [], *settings)
    lists = [[x] for x in arguments]
    with pytest.raises(RuntimeError, match="left must be contiguous"):
        torch.ops.megatron_opt.project_adam(*lists[:3], lists[4], [], *settings)
    with pytest.raises(RuntimeError, match="overlapping or scattered rows"):
        row = torch.zeros(1, 1, 20).expand(1, 12, 20)
        torch.ops.megatron_opt.project_adam(lists[0], [row], lists[2], [], [], *settings)
    with pytest.raises(RuntimeError, match="moment must have the shapes"):
        torch.ops.megatron_opt.project_adam(lists[0], [torch.zeros(1, 12, 19)], lists[2], [], [], *settings)
    with pytest.raises(RuntimeError, match="equally long"):
        torch.ops.megatron_opt.project_adam(lists[0], [], lists[2], [], [], *settings)


def lists_of(shapes, seed=0, dtype=torch.float32):
    """Gradients, moments and seconds of matrices and stacks, bases and well-conditioned factors of both sides."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lists = [[draw(*shape).to(dtype) for shape in shapes] for _ in range(3)]
    lists[2] = [x.square() + 0.1 for x in lists[2]]
    for side in (-2, -1):
        squares = [draw(*shape[:-2], shape[side], shape[side]) for shape in shapes]
        bases = [torch.linalg.qr(x)[0] for x in squares]
        spread = [q * torch.linspace(1, 0.1, q.shape[-1], dtype=torch.float64) for q in bases]
        # factors whose eigenvectors are near the bases, in another order
        factors = [s @ q.mT + 0.01 * x @ x.mT / x.shape[-1] for s, q, x in zip(spread, bases, squares)]
        lists += [[q.flip(-1).contiguous().to(dtype) for q in bases], [f.to(dtype) for f in factors]]
    grads, moments, seconds, lefts, left_factors, rights, right_factors = lists
    return grads, moments, seconds, lefts, rights, left_factors, right_factors


MIXED = [(64, 64), (3, 33, 20), (1, 1), (100, 12), (2, 65, 96)]


def in_double(lists):
    return [[x.double() for x in several] for several in lists]


@native
@pytest.mark.parametrize("sides", [(0, 1), (0,), (1,)])
def test_factors_of_lists_are_float64s(sides):
    grads, _, _, _, _, lefts, rights = lists_of(MIXED)
    lefts, rights = lefts if 0 in sides else [], rights if 1 in sides else []
    exact = in_double([lefts, rights, grads])
    projection._advance(*exact, 0.05, 0.95)
    projection.advance_factors(lefts, rights, grads, 0.05, 0.95)
    for ours, theirs in ((lefts, exact[0]), (rights, exact[1])):
        assert len(ours) == len(theirs) and all(torch.equal(x, x.mT) for x in ours)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("sides, floor", [((0, 1), 0.0), ((0,), 0.0), ((1,), 0.5), ((0, 1), 0.5)])
def test_steps_of_lists_advance_factors_first(sides, floor):
    lists = list(lists_of(MIXED))
    for which, side in ((3, 0), (4, 1), (5, 0), (6, 1)):
        lists[which] = lists[which] if side in sides else []
    exact = in_double(lists)
    projection._step(*exact, 0.9, 0.95, 1e-8, 0.7, 0.05, 0.95, floor)
    projection.project_adam(*lists, beta1=0.9, beta2=0.95, eps=1e-8, scale=0.7, gain=0.05, decay=0.95, floor=floor)
    for ours, theirs in zip(lists, exact):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@native
@pytest.mark.parametrize("sides", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_refreshed_bases_of_lists_are_float64s(sides, shift):
    lists = list(lists_of(MIXED))
    for which, side in ((3, 0), (4, 1), (5, 0), (6, 1)):
        lists[which] = lists[which] if side in sides else []
    exact, before = in_double(lists), lists[2][0].clone()
    eps = torch.finfo(torch.float32).eps
    expected = eb._refresh_reference(*exact[1:], shift, 2 * eps, 1e-5, 1e-5)
    bases, factors = ({side: lists[first + side] for side in sides} for first in (3, 5))
    found = eb.refresh_bases(lists[1], lists[2], bases, factors, shift)
    assert found.all() and expected.all() and len(found) == 8
    assert not torch.equal(before, lists[2][0]) and torch.equal(
        before.flatten().sort()[0], lists[2][0].flatten().sort()[0]
    )
    for ours, theirs in zip(lists[1:5], exact[1:5]):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@native
def test_blocks_whose_bases_are_not_found_stay():
    lists = list(lists_of([(3, 20, 33), (12, 20)]))
    lists[5][0][1] = torch.ones(20, 20)  # rank one
    lists[6][1].fill_(float("nan"))
    before = [[x.clone() for x in several] for several in lists]
    found = eb.refresh_bases(lists[1], lists[2], {0: lists[3], 1: lists[4]}, {0: lists[5], 1: lists[6]})
    assert found.tolist() == [True, False, True, False]
    for ours, old in zip(lists[1:5], before[1:5]):
        assert torch.equal(ours[0][1], old[0][1]) and torch.equal(ours[1], old[1])
        assert not torch.equal(ours[0][0], old[0][0]) and not torch.equal(ours[0][2], old[0][2])


@native
def test_what_steps_beside_a_block_and_how_many_threads_change_no_bit(set_threads):
    def run(lists):
        projection.advance_factors(*lists[5:], lists[0], 0.05, 0.95)
        settings = dict(beta1=0.9, beta2=0.95, eps=1e-8, scale=0.7, gain=0.05, decay=0.95)
        projection.project_adam(*lists, **settings)
        eb.refresh_bases(lists[1], lists[2], {0: lists[3], 1: lists[4]}, {0: lists[5], 1: lists[6]})
        return lists

    results = []
    for count in (1, 2, 3):
        set_threads(count)
        results.append(run(lists_of(MIXED)))
        # each alone
        parts = [run([several[i : i + 1] for several in lists_of(MIXED)]) for i in range(len(MIXED))]
        results.append([[part[which][0] for part in parts] for which in range(7)])
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True))


@native
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(batch, set_threads):
    arguments, l = problem(batch, 90, 70), triangle(90, "lower", batch)
    columns = torch.eye(90) + 0.03 * rectangle(batch, 90, 90, 8)
    results = []
    for count in (1, 1, 2, 3):
        set_threads(count)
        basis, found = eb.cholesky_qr(columns)
        solved = products.solve_lower(l, arguments[0])
        shaped = products.matmul(l, arguments[0], a_shape="lower")
        results.append([*step_of(torch.float32, arguments, (0, 1)), basis, found, solved, shaped])
    for result in results[1:]:
        assert result[4].all() and all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
