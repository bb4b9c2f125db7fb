"""Newton–Schulz against the exact polar factor, the scalar polynomial on singular values, and peers' coefficients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_opt.errors import UserError
from megatron_opt.kernels import orthogonalize as ns


def with_spectrum(m, n, values):
    """An m×n matrix (m ≤ n) with the given singular values, and its polar factor."""
    u = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0]
    return u * values @ v.T, u @ v.T


def power_law(k, condition=500.0):
    exponent = -torch.log(torch.tensor(condition)) / torch.log(torch.tensor(float(k)))
    return torch.arange(1, k + 1, dtype=torch.float64) ** exponent


def error(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def gaussian():
    """A Gaussian 512×2048 matrix and its polar factor."""
    torch.manual_seed(0)
    x = torch.randn(512, 2048, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(x @ x.T)
    return x.float(), vectors * values.rsqrt() @ vectors.T @ x


@pytest.fixture(scope="module")
def skewed():
    """A 512×512 matrix with a power-law spectrum of condition 500, and its polar factor."""
    torch.manual_seed(0)
    x, polar = with_spectrum(512, 512, power_law(512))
    return x.float(), polar


# Errors published for these spectra in fp32 and bf16 (polar_express there with another safety factor, hence .013).
@pytest.mark.parametrize(
    "kind, steps, fp32, bf16, slack",
    [
        ("simple", 5, 0.178, 0.178, 0.005),
        ("quintic", 5, 0.137, 0.137, 0.007),
        ("polar_express", 5, 0.104, 0.104, 0.013),
        ("cans", 5, 0.085, 0.085, 0.003),
        ("polar_express", 8, 0.000, 0.019, 0.001),
        ("deepseekv4", 10, 0.000, 0.021, 0.001),
    ],
)
def test_error_on_a_power_law(kind, steps, fp32, bf16, slack, skewed):
    x, polar = skewed
    table = ns.coefficients(kind, steps)
    for precision, expected in (("high", fp32), ("medium", bf16)):
        (y,) = ns.orthogonalize([x], table, 1e-20, precision)
        assert abs(error(y, polar) - expected) < slack, precision


@pytest.mark.parametrize("kind, expected, slack", [("simple", 0.146, 0.015), ("quintic", 0.017, 0.005)])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_error_on_a_gaussian(kind, expected, slack, precision, gaussian):
    x, polar = gaussian
    (y,) = ns.orthogonalize([x], ns.coefficients(kind, 5), 1e-20, precision)
    assert abs(error(y, polar) - expected) < slack


@pytest.mark.parametrize("kind", [*ns.SETS, "custom"])
@pytest.mark.parametrize("shape", [(24, 24), (16, 96), (96, 16), (1, 7), (7, 1)])
def test_singular_values_follow_the_polynomial(kind, shape):
    torch.manual_seed(1)
    custom = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5)) if kind == "custom" else ()
    table = ns.coefficients(kind, 5, custom)
    x = torch.randn(*shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() + 1e-3)
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    (y,) = ns.orthogonalize([x], table, 1e-3, "high")
    torch.testing.assert_close(y, u * s @ vt, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", list(ns.SETS))
def test_coefficients_equal_a_peers(kind):
    peer = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon_utils")
    theirs = peer._COEFFICIENT_SETS[kind]
    mode = "repeat_last" if kind in ("polar_express", "cans", "deepseekv4") else "cycle"
    assert list(ns.coefficients(kind, 12)) == list(peer.get_coefficient_iterator(12, theirs, mode))


@pytest.mark.parametrize("kind, steps", [("simple", 5), ("polar_express", 8), ("cans", 5), ("deepseekv4", 10)])
def test_gram_form_equals_standard_form(kind, steps):
    torch.manual_seed(2)
    table = ns.coefficients(kind, steps)
    x, _ = with_spectrum(48, 400, power_law(48))
    x = x / x.norm()
    exact = ns.standard_form(x, table)
    assert error(ns.gram_form(x, table), exact) < 1e-9
    assert error(ns.gram_form(x.float(), table), exact) < 3e-5
    assert error(ns.standard_form(x.float(), table), exact) < 3e-5


def test_bf16_gram_form_is_as_exact_as_bf16_standard_form():
    torch.manual_seed(3)
    x, _ = with_spectrum(64, 512, power_law(64))
    for kind in ("simple", "quintic"):
        table = ns.coefficients(kind, 5)
        normalized = x / x.norm()
        exact = ns.standard_form(normalized, table)
        gram = error(ns.gram_form(normalized.bfloat16(), table), exact)
        assert gram < 1.3 * error(ns.standard_form(normalized.bfloat16(), table), exact)
        assert ns.uses_gram_form(64, 512, torch.bfloat16, table)
    for kind, steps in (("cans", 5), ("polar_express", 5), ("simple", 8)):  # these overflow or stray in bf16
        assert not ns.uses_gram_form(64, 512, torch.bfloat16, ns.coefficients(kind, steps))


def of_all_kinds(m, n):
    """Matrices at the edges of what the polynomials are made for: σ₁/‖·‖ from 1 (rank 1) to 1/√k, conditions up to 1e6."""
    k = min(m, n)
    values = torch.stack([torch.logspace(0, -6, k), torch.cat([torch.ones(1), torch.full((k - 1,), 1e-2)])])
    low = [torch.randn(m, rank) @ torch.randn(rank, n) for rank in (1, 1, 2, max(1, k // 4))]
    return [*low, torch.ones(m, n), torch.randn(m, n), *(with_spectrum(k, max(m, n), s)[0].float() for s in values)]


@pytest.mark.parametrize("steps", [5, 8])
@pytest.mark.parametrize("kind", list(ns.SETS))
def test_no_matrix_grows_without_bound(kind, steps, monkeypatch):
    """In bf16 as in fp32, natively and in torch, the largest singular value stays near the polynomials' own (1.25)."""
    torch.manual_seed(5)
    table = ns.coefficients(kind, steps)
    xs = [x for m, n in ((8, 8), (8, 33), (64, 16), (64, 64), (100, 512)) for _ in range(2) for x in of_all_kinds(m, n)]
    for kernels in ("native", "reference"):
        monkeypatch.setenv("MEGATRON_OPT_KERNELS", kernels)
        for precision in ("medium", "high"):
            for y in ns.orthogonalize(xs, table, 1e-7, precision):
                assert torch.linalg.matrix_norm(y, 2) < 1.3


def test_only_sets_that_bf16_drives_out_of_their_range_get_its_safety_factor():
    changed = {
        kind for kind in ns.SETS if ns.safe(ns.coefficients(kind, 5), torch.bfloat16) != ns.coefficients(kind, 5)
    }
    assert changed == {"cans"}
    cans = ns.coefficients("cans", 5)
    assert ns.safe(cans, torch.float32) == cans and ns.bounded(cans) and not ns.bounded(cans, 2**-8)
    assert ns.bounded(ns.safe(cans, torch.bfloat16), 2**-7)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_batching_changes_nothing(precision):
    torch.manual_seed(4)
    shapes = [(8, 32), (32, 8), (8, 32), (16, 16), (8, 33), (3, 100), (16, 16)]
    xs = [torch.randn(*shape) * 10 ** (i - 3) for i, shape in enumerate(shapes)]
    table = ns.coefficients("simple", 5)
    together = ns.orthogonalize(xs, table, 1e-7, precision)
    for x, y in zip(xs, together):
        assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
        (alone,) = ns.orthogonalize([x], table, 1e-7, precision)
        assert error(y, alone.double()) < (3e-2 if precision == "medium" else 3e-6)


@pytest.mark.parametrize("form", ["add", "max"])
@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("eps", [1e-5, 1e-25])
def test_zero_and_tiny_matrices_stay_finite(form, precision, eps):
    table = ns.coefficients("simple", 5)
    zero, tiny = ns.orthogonalize([torch.zeros(4, 40), torch.full((4, 40), 1e-12)], table, eps, precision, form)
    assert torch.equal(zero, torch.zeros(4, 40)) and tiny.isfinite().all()


def test_normalization_forms():
    x = torch.randn(6, 9, dtype=torch.float64)
    table = ns.coefficients("simple", 5)
    (added,) = ns.orthogonalize([x], table, 1.0, "high", "add")
    (maximum,) = ns.orthogonalize([x], table, 1.0, "high", "max")
    norm = x.norm()
    torch.testing.assert_close(added, ns.standard_form(x / (norm + 1.0), table))
    torch.testing.assert_close(maximum, ns.standard_form(x / norm, table))


@pytest.mark.parametrize("shape", [(32, 32), (32, 64), (16, 512), (512, 16)])
@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("steps", [5, 6])
def test_flops_are_what_runs(shape, precision, steps, monkeypatch):
    """By torch's own count: a native kernel's formula would be compared with itself."""
    monkeypatch.setenv("MEGATRON_OPT_KERNELS", "reference")
    table = ns.coefficients("simple", steps)
    with FlopCounterMode(display=False) as counter:
        ns.orthogonalize([torch.randn(*shape)], table, 1e-7, precision)
    k, K = sorted(shape)
    assert counter.get_total_flops() == ns.flops(k, K, table, precision)


def test_bad_coefficients_are_refused():
    for kind, steps, custom in (("aol", 5, ()), ("simple", 0, ()), ("custom", 5, ())):
        with pytest.raises(UserError):
            ns.coefficients(kind, steps, custom)
