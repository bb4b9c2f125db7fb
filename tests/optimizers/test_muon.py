"""Muon and Scion against float64 transcriptions and peers."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers import sharded_orthogonalization as sharded
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.muon import SCALE_MODES, shape_scale

SHAPES = [(12, 20), (20, 12), (16, 16), (5, 64)]


def newton_schulz(x, steps=5):
    """The quintic iteration of the study, written out."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def run(name, options, grads, shape, weight=None, prefix=""):
    optimizer = registry.build(name, options)
    info = MatrixInfo(prefix + "w", shape)
    state = optimizer.init_state(torch.zeros(shape, dtype=grads[0].dtype) if weight is None else weight, info)
    return [optimizer.update([g.clone()], [state], t, [info])[0] for t, g in enumerate(grads, 1)]


def gradients(shape, count=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["sum", "ema"])
def test_muon_is_the_papers(shape, nesterov, form):
    grads, mu, eps = gradients(shape), 0.9, 1e-5
    options = dict(momentum=mu, nesterov=nesterov, momentum_form=form, eps=eps, fp32_matmul_prec="high")
    ours = run("muon", options, grads, shape)
    buffer, weight = torch.zeros(shape, dtype=torch.float64), 1.0 if form == "sum" else 1 - mu
    for g, u in zip(grads, ours):
        buffer = mu * buffer + weight * g
        v = mu * buffer + weight * g if nesterov else buffer
        x = newton_schulz(v / (v.pow(2).sum().sqrt() + eps))
        torch.testing.assert_close(u, max(1, shape[0] / shape[1]) ** 0.5 * x, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_scion_is_the_papers(shape):
    grads, mu, eps = gradients(shape), 0.9, 1e-5
    ours = run("scion", dict(momentum=mu, eps=eps, radius=3.0, fp32_matmul_prec="high"), grads, shape)
    buffer = torch.zeros(shape, dtype=torch.float64)
    for g, u in zip(grads, ours):
        buffer = mu * buffer + (1 - mu) * g
        x = newton_schulz(buffer / (buffer.pow(2).sum().sqrt() + eps))
        torch.testing.assert_close(u, 3.0 * max(1, shape[0] / shape[1]) ** 0.5 * x, rtol=1e-9, atol=1e-11)


def step_weights(weight, updates, lr=0.02, decay=0.1):
    """W ← W − lr·(u + decay·W), and the trajectory."""
    for u in updates:
        weight = weight - lr * (u + decay * weight)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["spectral", "shape_scaling", "unit_rms_norm"])
def test_muon_equals_emerging_optimizers_over_50_steps(shape, mode):
    peer = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers.muon")
    grads = gradients(shape, 50, torch.float32)
    start = gradients(shape, 1, torch.float32, seed=9)[0]
    parameter = torch.nn.Parameter(start.clone())
    theirs = peer.Muon(
        [parameter], lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, fp32_matmul_prec="high",
        coefficient_type="quintic", scale_mode=mode,
    )  # fmt: skip
    for g in grads:
        parameter.grad = g.clone()
        theirs.step()
    # the peer keeps an EMA and divides by max(‖u‖, 1e-7)
    options = dict(
        momentum=0.9, momentum_form="ema", coefficient_type="quintic", scale_mode=mode, eps=1e-7, norm_form="max",
        fp32_matmul_prec="high",
    )  # fmt: skip
    ours = step_weights(start, run("muon", options, grads, shape))
    assert float((ours - parameter.detach()).norm() / parameter.detach().norm()) < 3e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_torch_over_50_steps(shape):
    grads = gradients(shape, 50, torch.float32)
    start = gradients(shape, 1, torch.float32, seed=9)[0]
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.Muon([parameter], lr=0.02, momentum=0.9, weight_decay=0.1, eps=1e-7)
    for g in grads:
        parameter.grad = g.clone()
        theirs.step()
    # torch keeps an EMA, divides by max(‖u‖, ε) and iterates in bf16: each of five steps may round by 2⁻⁸
    options = dict(momentum=0.9, momentum_form="ema", eps=1e-7, norm_form="max")
    ours = step_weights(start, run("muon", options, grads, shape))
    assert float((ours - parameter.detach()).norm() / (parameter.detach() - start).norm()) < 5 * 2**-8


def test_normuon_equalizes_rows_and_keeps_the_norm():
    shape = (24, 40)
    scale = torch.logspace(0, -2, 24, dtype=torch.float64)[:, None]
    grads = [g * scale for g in gradients(shape, 30)]
    plain = run("muon", dict(fp32_matmul_prec="high"), grads, shape)
    optimizer = registry.build("muon", dict(normuon=True, normuon_beta2=0.9, fp32_matmul_prec="high"))
    info = MatrixInfo("w", shape)
    state = optimizer.init_state(torch.zeros(shape, dtype=torch.float64), info)
    moment = torch.zeros(24, 1, dtype=torch.float64)
    for t, (g, o) in enumerate(zip(grads, plain), 1):
        u = optimizer.update([g.clone()], [state], t, [info])[0]
        moment = 0.9 * moment + 0.1 * (o * o).mean(1, keepdim=True)
        rows = o / (moment.sqrt() + 1e-10)
        torch.testing.assert_close(u, rows * o.norm() / rows.norm(), rtol=1e-9, atol=1e-12)
    spread = lambda x: float(x.norm(dim=1).max() / x.norm(dim=1).min())  # noqa: E731
    assert spread(u) < spread(plain[-1])


def test_scales():
    assert [round(shape_scale((64, 16), mode), 6) for mode in SCALE_MODES] == [2.0, 8.0, 2.0, 1.0]
    assert [round(shape_scale((16, 64), mode), 6) for mode in SCALE_MODES] == [1.0, 8.0, 0.5, 1.0]


def test_rms_matching():
    """Moonlight's 0.2·√max gives an update of AdamW's RMS, about 0.2, for any shape."""
    for shape in [(64, 64), (32, 128), (128, 32)]:
        (u,) = run(
            "muon",
            dict(scale_mode="spectral", extra_scale_factor=0.2),
            gradients(shape, 1, torch.float32),
            shape,
        )
        assert 0.15 < float(u.square().mean().sqrt()) < 0.25


@pytest.mark.parametrize("dtype, smallest, largest", [("bf16", 1e-4, 0.02), ("int8", 1e-3, 0.06)])
def test_narrow_momentum_error_is_small_and_known(dtype, smallest, largest):
    """Relative error of the direction over 100 steps: about 1% in bf16, 4% in 8-bit blocks."""
    shape = (48, 96)
    grads = gradients(shape, 100, torch.float32)
    options = dict(fp32_matmul_prec="high", momentum=0.95)
    full, narrow = run("muon", options, grads, shape), run("muon", options | {"momentum_dtype": dtype}, grads, shape)
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(full, narrow)]
    assert smallest < max(errors) < largest


@pytest.mark.parametrize(
    "options",
    [
        dict(scale_mode="sideways"),
        dict(momentum=1.0),
        dict(eps=0.0),
        dict(coefficient_type="aol"),
        dict(coefficient_type="custom"),
        dict(custom_coefficients=((1.0, 0.0, 0.0),)),
        dict(num_ns_steps=0),
        dict(fp32_matmul_prec="low"),
        dict(momentun=0.9),
    ],
)
def test_meaningless_options_are_refused(options):
    with pytest.raises(UserError):
        registry.build("muon", options)


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 9))
def test_half_of_a_symmetric_matrix_is_all_of_it(size, cuts, seed):
    """Rows folded apart, joined and unfolded give the matrix back bit for bit."""
    draw = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    matrix = draw + draw.T
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    folded = [sharded.fold(matrix[start:stop], start) for start, stop in pairwise(edges)]
    assert torch.equal(sharded.unfold(torch.cat(folded)), matrix)
    assert sum(part.numel() for part in folded) == size * (size // 2 + 1)
