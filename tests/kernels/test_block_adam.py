"""Adam-mini's fused step: native against float64 and the reference, over sizes, scales, addresses and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.kernels.block_adam import block_adam
from megatron_opt.kernels.dispatch import native_available
from megatron_opt.kernels.multi_tensor import Coefficients

native = pytest.mark.skipif(not native_available(), reason="the extension is not built")
C = Coefficients(
    beta1=0.9,
    input_weight1=0.1,
    beta2=0.98,
    input_weight2=0.02,
    eps=1e-8,
    momentum_weight=1.7,
    inv_sqrt_correction2=2.0,
)
SHAPES = st.sampled_from([(1, 1), (3, 1), (1, 17), (64, 64), (12, 100), (2, 2049), (0, 5), (40, 1100)])


def problem(shapes, dtype=torch.float32, scale=1.0, offset=0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def made(*shape):
        flat = torch.randn(offset + torch.Size(shape).numel(), generator=generator)[offset:] * scale
        return flat.view(shape).to(dtype)

    seconds = [made(rows, 1).square() for rows, _ in shapes]
    grads = [made(*s) for s in shapes]
    return grads, [made(*s).abs() * g.sign() for s, g in zip(shapes, grads)], seconds  # sums that do not cancel


def run(arguments):
    grads, moments, seconds = ([x.clone() for x in part] for part in arguments)
    return [*block_adam(grads, moments, seconds, C), *moments, *seconds]


@native
@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 1e-3, 1e-22, 1e-39, 1e15]),
    offset=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_the_kernel_is_the_float64_reference(shapes, scale, offset, seed):
    arguments = problem(shapes, scale=scale, offset=offset, seed=seed)
    exact = run([[x.double() for x in part] for part in arguments])
    for a, b in zip(run(arguments), exact, strict=True):
        largest = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * largest + 1e-44)


@native
def test_any_number_of_threads_gives_the_same_bits(set_threads):
    arguments = problem([(700, 100), (1, 70_000), (3, 3), (0, 4), (50_000, 1), (2, 40_000)])
    results = []
    for count in (1, 1, 2, 3, 5):
        set_threads(count)
        results.append(run(arguments))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@native
def test_nan_stays_in_its_block():
    grads, moments, seconds = problem([(5, 40)])
    grads[0][2, 7] = float("nan")
    (u,) = block_adam(grads, moments, seconds, C)
    assert u[2].isnan().all() and u.isnan().sum() == 40 and seconds[0].isnan().sum() == 1


@native
def test_what_does_not_fit_is_refused():
    grads, moments, seconds = problem([(6, 4)])
    operator, out = torch.ops.megatron_opt.block_adam, [torch.zeros(6, 4)]
    with pytest.raises(RuntimeError, match="which do not divide"):
        operator(grads, moments, [torch.zeros(5)], out, list(C))
    with pytest.raises(RuntimeError, match=r"moments\[0\] has 3 elements instead of 24"):
        operator(grads, [torch.zeros(3)], seconds, out, list(C))
    with pytest.raises(RuntimeError, match=r"moments\[0\] is not contiguous"):
        operator(grads, [torch.zeros(4, 6).T], seconds, out, list(C))
    with pytest.raises(RuntimeError, match=r"moments\[0\] is not contiguous"):
        operator(grads, [torch.zeros(1, 4).expand(6, 4)], seconds, out, list(C))


def test_an_empty_list_does_nothing():
    assert block_adam([], [], [], C) == []
