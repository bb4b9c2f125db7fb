"""Native products and Newton–Schulz: against float64, over shapes, layouts of memory and numbers of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.kernels import products

native = pytest.mark.skipif(
    not products.available(torch.zeros(1)), reason="no extension, or no AVX-512 in this processor"
)
native_bf16 = pytest.mark.skipif(
    not products.available(torch.zeros(1), "bf16_products"), reason="no extension, or no AVX512_BF16"
)
SIDES = st.sampled_from([1, 2, 11, 12, 13, 16, 31, 32, 33, 47, 100, 129])
SIMPLE = ns.coefficients("simple", 5)


def made(shape, seed, transposed=False, spread=False):
    """A matrix, as the transpose of one or as part of a wider one where asked."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    wide = torch.randn((*shape[:-1], shape[-1] + (5 if spread else 0)), generator=generator)
    x = wide[..., : shape[-1]]
    return x.mT if transposed else x


def assert_product(ours, a, b, scale=1.0):
    exact = a.double() @ b.double()
    bound = 1e-6 * (a.double().abs() @ b.double().abs()) * scale + 1e-12
    assert ((ours.double() - exact).abs() <= bound).all()


@native
@settings(max_examples=120, deadline=None)
@given(
    m=SIDES, n=SIDES, k=SIDES, batch=st.sampled_from([None, 1, 3]), flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_products_are_float64s(m, n, k, batch, flags, seed):
    lead = () if batch is None else (batch,)
    a = made((*lead, m, k), seed, flags[0], flags[1])
    b = made((*lead, k, n), seed + 1, flags[2], flags[3])
    assert products._taken(a, b)
    assert_product(products.matmul(a, b), a, b)
    start = torch.randn(*lead, m, n)
    out = products.accumulate(start.clone(), a, b, alpha=0.5, beta=-2.0)
    expected = 0.5 * (a.double() @ b.double()) - 2.0 * start.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@native
@settings(max_examples=40, deadline=None)
@given(n=SIDES, k=SIDES, batch=st.sampled_from([None, 4]), transposed=st.booleans())
def test_symmetric_products_are_exactly_symmetric(n, k, batch, transposed):
    lead = () if batch is None else (batch,)
    a = made((*lead, n, k), 1, transposed)
    ours = products.matmul(a, a.mT, symmetric=True)
    assert torch.equal(ours, ours.mT)
    assert_product(ours, a, a.mT)
    average = torch.randn(*lead, n, n)
    average = average + average.mT
    out = products.accumulate(average.clone(), a, a.mT, 0.1, 0.9, symmetric=True)
    torch.testing.assert_close(
        out.double(), 0.9 * average.double() + 0.1 * (a.double() @ a.double().mT), rtol=1e-5, atol=1e-5
    )


@native
def test_any_number_of_threads_gives_the_same_bits(set_threads):
    a, b, many = made((300, 200), 1), made((200, 250), 2), made((9, 40, 70), 3)
    matrices = [made((60, 90), 4), made((128, 64), 5), made((33, 33), 6)]
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        results = [products.matmul(a, b), products.matmul(a, a.mT, symmetric=True)]
        results += [products.matmul(many, many.mT, symmetric=True)]
        results += products.orthogonalize(matrices, SIMPLE, 1e-5, bf16=products._processor("bf16_products"))
        results += products.orthogonalize(matrices[:1], SIMPLE, 1e-5, bf16=False, gram=2)
        found.append(results)
    for results in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results, found[0], strict=True))


def test_what_is_not_native_takes_torch():
    """Other types, broadcasting, odd strides: the same function, torch's products."""
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(products.matmul(a, b), a @ b)
    batch, single = torch.randn(3, 6, 4), torch.randn(4, 5)
    torch.testing.assert_close(products.matmul(batch, single), batch @ single)
    odd = torch.randn(12, 8)[::2, ::2]
    torch.testing.assert_close(products.matmul(odd, single), odd @ single)
    out = torch.zeros(6, 5)
    torch.testing.assert_close(products.accumulate(out, odd, single), odd @ single)


@native
def test_products_that_do_not_fit_are_refused():
    operator = torch.ops.megatron_opt.product
    a, out = torch.zeros(4, 6), torch.zeros(4, 4)
    for arguments, message in (
        ((out, a, a, 1.0, 0.0, False), "do not give"),
        ((a, a, torch.zeros(6, 6), 1.0, 0.0, False), "no operand"),
        ((torch.zeros(4, 5), a, torch.zeros(6, 5), 1.0, 0.0, True), "must be square"),
        ((out, torch.zeros(8, 12)[::2, ::2], torch.zeros(6, 4), 1.0, 0.0, False), "neither row-major"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


@native
@pytest.mark.parametrize("gram", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 64), (33, 70), (70, 33), (96, 96), (12, 200)])
def test_fp32_newton_schulz_is_float64s(shape, gram):
    matrix = made(shape, 3)
    (ours,) = products.orthogonalize([matrix], SIMPLE, 1e-5, bf16=False, gram=gram)
    (exact,) = ns.orthogonalize([matrix.double()], SIMPLE, precision="high")
    assert (ours.double() - exact).norm() / exact.norm() < 2e-5


@native_bf16
@pytest.mark.parametrize("kind", ["simple", "quintic", "polar_express", "cans"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 176), (176, 64), (40, 400)])
def test_bf16_newton_schulz_is_as_exact_as_torchs(shape, kind, monkeypatch):
    """Distance from the float64 iteration, beside that of torch's bf16 path, for flat and for steep spectra."""
    table, k = ns.coefficients(kind, 5), min(shape)
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(shape[0], k, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], k, dtype=torch.float64, generator=generator)).Q
    for values in (torch.linspace(1, 0.2, k), 1.0 / torch.arange(1, k + 1), torch.logspace(0, -4, k)):
        matrix = ((left * values.double()) @ right.mT).float()
        (exact,) = ns.orthogonalize([matrix.double()], table, precision="high")
        errors = []
        for kernels in ("native", "reference"):
            monkeypatch.setenv("MEGATRON_OPT_KERNELS", kernels)
            (found,) = ns.orthogonalize([matrix], table)
            errors.append(((found.double() - exact).norm() / exact.norm()).item())
        # Two steps on the Gram matrix round twice as much where the spectrum is flat, and less where it is steep.
        assert errors[0] < (1.3 if min(shape) * 1.25 > max(shape) else 2.2) * errors[1] + 5e-3


@native
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=native_bf16)])
def test_zero_gives_zero_and_nan_stays_in_its_matrix(bf16):
    odd = torch.ones(6, 9)
    odd[2, 3] = float("nan")
    zero, spoiled, whole = products.orthogonalize([torch.zeros(9, 6), odd, made((6, 9), 1)], SIMPLE, 1e-5, bf16=bf16)
    assert torch.equal(zero, torch.zeros(9, 6)) and spoiled.isnan().any() and whole.isfinite().all()
    assert products.orthogonalize([], SIMPLE, 1e-5) == []
    (empty,) = products.orthogonalize([torch.zeros(0, 4)], SIMPLE, 1e-5, bf16=bf16)
    assert empty.shape == (0, 4)
