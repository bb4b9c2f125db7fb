"""The fused update: native kernels against the torch reference and float64, over sizes, types, threads."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.kernels import multi_tensor as mt
from megatron_opt.kernels.dispatch import native_available
from megatron_opt.kernels.multi_tensor import Coefficients, Sum, UpdateKind

native = pytest.mark.skipif(not native_available(), reason="the extension is not built")
STATES = {UpdateKind.ADAM: 2, UpdateKind.MARS: 3, UpdateKind.CAUTIOUS: 2, UpdateKind.SOPHIA: 2, UpdateKind.APPLY: 0}
COEFFICIENTS = Coefficients(
    lr=1e-2, decay_factor=1e-3, grad_scale=0.5, beta1=0.9, input_weight1=0.1, beta2=0.98, input_weight2=0.02, eps=1e-8,
    momentum_weight=1.7, gradient_weight=0.3, inv_sqrt_correction2=2.0, gamma=0.4,
)  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 7, 63, 2047, 2048, 2049, 4096, 5000, 33000])
TYPES = st.sampled_from([torch.float32, torch.bfloat16])


def tensor(size, dtype, offset, scale, generator, positive=False):
    """Values of a given size on a memory address that is `offset` elements beside an aligned one."""
    values = torch.randn(size + offset, generator=generator) * scale
    values = values.abs() if positive else values
    return values.to(dtype)[offset:]


def problem(kind, sizes, dtypes, offset=0, scale=1.0, seed=0, scaled=False):
    """Arguments of `mt.update` for a rule: every slot has its own type."""
    generator = torch.Generator().manual_seed(seed)
    param_type, grad_type, state_type = dtypes

    def make(dtype, size_of=1.0, positive=False):
        return [tensor(size, dtype, offset, size_of, generator, positive) for size in sizes]

    states = [make(state_type, scale), make(state_type, scale * scale, True), make(state_type, scale)]
    outputs = kind == UpdateKind.MOMENTUM
    return {
        "kind": kind,
        "params": [] if outputs else make(param_type),
        "grads": make(grad_type, scale),
        "states": states[: STATES.get(kind, 1)],
        "copies": make(param_type if outputs else torch.bfloat16),
        "scales": torch.rand(len(sizes), 2, generator=generator) + 0.5 if scaled else None,
    }


def mapped(function, value):
    """The same structure with `function` of every tensor."""
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [mapped(function, item) for item in value]
    return function(value) if isinstance(value, torch.Tensor) else value


def run(arguments, coefficients=COEFFICIENTS, **options):
    """The arguments after the update, and its sums."""
    arguments = mapped(torch.clone, arguments)
    kind, params, grads, states = (arguments[key] for key in ("kind", "params", "grads", "states"))
    rest = {"copies": arguments["copies"], "scales": arguments["scales"]} | options
    sums = mt.update(kind, params, grads, states, coefficients, with_sums=True, **rest)
    return [*params, *arguments["copies"], *(s for state in states for s in state)], sums


def run_reference(monkeypatch, *args, **options):
    monkeypatch.setenv("MEGATRON_OPT_KERNELS", "reference")
    try:
        return run(*args, **options)
    finally:
        monkeypatch.delenv("MEGATRON_OPT_KERNELS")


def assert_near(ours, theirs):
    """Equal to rounding, beside the largest value of each tensor: sums of two terms cancel here and there."""
    for a, b in zip(ours, theirs, strict=True):
        a, b, rtol = a.double(), b.double(), 1e-5 if a.dtype == torch.float32 else 1.6e-2
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10 * largest + 1e-44, equal_nan=True)


@native
@pytest.mark.parametrize("cautious_decay", [False, True])
@pytest.mark.parametrize("kind", list(UpdateKind))
def test_fp32_kernel_is_the_float64_reference(kind, cautious_decay):
    arguments = problem(kind, [5, 4096, 1, 70000, 0, 2049], [torch.float32] * 3, scaled=True)
    ours, sums = run(arguments, cautious_decay=cautious_decay)
    wide = mapped(torch.Tensor.double, arguments)
    wide["copies"] = arguments["copies"] if kind != UpdateKind.MOMENTUM else wide["copies"]
    theirs, wide_sums = run(wide, cautious_decay=cautious_decay)
    for a, b in zip(ours, theirs, strict=True):
        tolerance = 2e-6 if a.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance / 4)
    torch.testing.assert_close(sums, wide_sums, rtol=1e-7, atol=0)


def decided(arguments):
    """No momentum, and no step of it and the gradient, that all but cancels: its sign would be left to rounding."""
    c = COEFFICIENTS
    for gradient, momentum in zip(arguments["grads"], arguments["states"][0] if arguments["states"] else ()):
        g = c.grad_scale * gradient.double()
        m = c.beta1 * momentum.double() + c.input_weight1 * g
        close = torch.zeros_like(m, dtype=torch.bool)
        for x, y in ((m - c.input_weight1 * g, c.input_weight1 * g), (c.momentum_weight * m, c.gradient_weight * g)):
            close |= (x + y).abs() < 0.05 * (x.abs() + y.abs())
        gradient[close] = momentum[close].to(gradient.dtype)
    return arguments


@native
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(UpdateKind)),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    dtypes=st.tuples(TYPES, TYPES, TYPES),
    offset=st.integers(0, 3),
    scale=st.sampled_from([1.0, 1e-3, 1e-22, 1e-39, 1e15, 1e25]),
    flags=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_kernel_is_the_reference(kind, sizes, dtypes, offset, scale, flags, seed):
    scaled, cautious_decay = flags
    arguments = decided(problem(kind, sizes, dtypes, offset, scale, seed, scaled))
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs, their_sums = run_reference(monkeypatch, arguments, cautious_decay=cautious_decay)
    ours, our_sums = run(arguments, cautious_decay=cautious_decay)
    assert_near(ours, theirs)
    torch.testing.assert_close(our_sums, their_sums, rtol=1e-6, atol=1e-70)


@native
@pytest.mark.parametrize("kind", list(UpdateKind))
def test_every_run_and_any_number_of_threads_give_the_same_bits(kind, set_threads):
    arguments = problem(kind, [100_000, 3, 2048, 70_001], [torch.float32, torch.bfloat16, torch.float32])
    results = []
    for count in (1, 1, 2, 3, 5):
        set_threads(count)
        results.append(run(arguments, stochastic=True, seed=3, step=2))
    for tensors, sums in results[1:]:
        assert torch.equal(sums, results[0][1])
        for a, b in zip(tensors, results[0][0], strict=True):
            assert torch.equal(a, b)


@native
@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(UpdateKind)), cut=st.integers(1, 5999), stochastic=st.booleans(), types=TYPES)
def test_the_way_a_tensor_is_cut_changes_no_bit(kind, cut, stochastic, types):
    arguments = problem(kind, [6000], [types, torch.float32, types])
    options = {"stochastic": stochastic, "seed": 11, "step": 4}
    whole, _ = run(arguments, element_offsets=[10], **options)

    def halves(tensors):
        return [part.clone() for t in tensors for part in (t[:cut], t[cut:])]

    pieces = {key: halves(arguments[key]) for key in ("params", "grads", "copies")}
    pieces |= {"kind": kind, "states": [halves(s) for s in arguments["states"]], "scales": None}
    parts, _ = run(pieces, element_offsets=[10, 10 + cut], **options)
    for i, tensor_whole in enumerate(whole):
        assert torch.equal(torch.cat(parts[2 * i : 2 * i + 2]), tensor_whole)


@native
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets_agree(isa, tmp_path):
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_multi_tensor as t\n"
        "from megatron_opt import _C\n"
        "types = [torch.float32, torch.bfloat16, torch.float32]\n"
        "out = [t.run(t.problem(r, [5000, 3], types)) for r in t.UpdateKind]\n"
        "torch.save((_C.cpu_kernels(), out), sys.argv[2])\n"
    )
    out = tmp_path / "results.pt"
    command = [sys.executable, "-c", program, os.path.dirname(__file__), out]
    subprocess.run(command, check=True, env=os.environ | {"MEGATRON_OPT_ISA": isa})
    name, results = torch.load(out)
    assert name in (isa, "portable")
    for kind, (theirs, _) in zip(UpdateKind, results, strict=True):
        ours, _ = run(problem(kind, [5000, 3], [torch.float32, torch.bfloat16, torch.float32]))
        assert_near(ours, theirs)


@native
def test_stochastic_rounding_is_the_references_bit_for_bit(monkeypatch):
    for kind in (UpdateKind.APPLY, UpdateKind.LION):
        arguments = problem(kind, [5000, 3], [torch.bfloat16, torch.float32, torch.bfloat16], seed=2)
        c = Coefficients(
            lr=1.0, beta1=0.0, input_weight1=1.0, beta2=0.0, input_weight2=1.0
        )  # no product to contract: same fp32
        ours, _ = run(arguments, c, stochastic=True, seed=2**40 + 5, step=7, element_offsets=[3, 2**33 + 1])
        theirs, _ = run_reference(
            monkeypatch, arguments, c, stochastic=True, seed=2**40 + 5, step=7, element_offsets=[3, 2**33 + 1]
        )
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_stochastic_rounding_has_no_bias():
    params = [torch.zeros(200_000, dtype=torch.bfloat16)]
    value = 1.0 + 0.3 * 2**-7  # three tenths of the way between two bf16 numbers
    mt.update(
        UpdateKind.APPLY,
        params,
        [torch.full((200_000,), -value)],
        (),
        Coefficients(),
        stochastic=True,
        seed=1,
        step=1,
    )
    assert set(params[0].unique().tolist()) == {1.0, 1.0 + 2**-7}
    above = (params[0] > 1.0).double().mean().item()
    assert abs(above - 0.3) < 5 * (0.3 * 0.7 / 200_000) ** 0.5


@native
@pytest.mark.parametrize("kind", list(Sum))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float64s(kind, dtype):
    generator = torch.Generator().manual_seed(1)

    def make(scale=1.0):
        return [tensor(size, dtype, 1, scale, generator) for size in (70_000, 1, 0, 2049)]

    params, grads, states = make(), make(), make()
    grads[0][:3] = torch.tensor([float("inf"), float("nan"), 1.0]) if kind == Sum.GRADIENT_NORM else 0.5
    inputs = {"params": params if kind == Sum.PRODUCTS else ()}
    inputs["states"] = states if kind in (Sum.CAUTIOUS_MASK, Sum.MARS_NORM) else ()
    ours = mt.sums(kind, grads, COEFFICIENTS, **inputs)
    wide = {key: [t.double() for t in value] for key, value in inputs.items()}
    theirs = mt.sums(kind, [g.double() for g in grads], COEFFICIENTS, **wide)
    borderline = 2.0 if kind == Sum.CAUTIOUS_MASK else 1e-6  # an element whose sign is lost in fp32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=borderline, equal_nan=True)
    if kind == Sum.GRADIENT_NORM:
        assert ours[0, 1] == 2


@native
def test_huge_gradients_do_not_overflow_their_norm():
    sums = mt.sums(Sum.GRADIENT_NORM, [torch.full((10,), 1e30)], Coefficients())
    assert sums[0, 0].item() == pytest.approx(1e61, rel=1e-6) and sums[0, 1] == 0


@native
@pytest.mark.parametrize(
    "kind", [UpdateKind.LION, UpdateKind.SIGNUM, UpdateKind.SOPHIA, UpdateKind.CAUTIOUS, UpdateKind.ADAM]
)
def test_nan_is_not_hidden(kind):
    arguments = problem(kind, [100], [torch.float32] * 3)
    arguments["grads"][0][5] = float("nan")
    (param, *_), sums = run(arguments)
    assert sums[0, 1] == 1 and param[5].isnan() and param.isnan().sum() == 1


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_what_is_not_supported_is_refused(kernels, monkeypatch):
    if kernels == "native" and not native_available():
        pytest.skip("the extension is not built")
    monkeypatch.setenv("MEGATRON_OPT_KERNELS", kernels)
    matrix = torch.zeros(4, 6)
    for bad in (matrix.T, torch.zeros(1, 6).expand(4, 6), matrix[:, ::2], torch.zeros(5)):
        with pytest.raises(RuntimeError, match=r"params\[0\] (is not contiguous|has)"):
            mt.update(
                UpdateKind.APPLY,
                [bad],
                [matrix[:, :3].contiguous() if bad.numel() == 12 else matrix],
                (),
                COEFFICIENTS,
            )


@native
def test_types_that_do_not_exist_natively_are_refused():
    with pytest.raises(RuntimeError, match="params has a tensor of type Half"):
        mt.update(UpdateKind.APPLY, [torch.zeros(3).half()], [torch.zeros(3)], (), COEFFICIENTS)
    with pytest.raises(RuntimeError, match="state1 has 0 tensors"):
        mt.update(UpdateKind.ADAM, [torch.zeros(3)], [torch.zeros(3)], [[torch.zeros(3)], []], COEFFICIENTS)


def test_an_empty_list_does_nothing():
    assert mt.update(UpdateKind.ADAM, [], [], [[], []], COEFFICIENTS).shape == (0, 3)
    assert mt.sums(Sum.GRADIENT_NORM, [], COEFFICIENTS).shape == (0, 3)


@native
def test_coefficients_may_come_from_a_tensor():
    arguments = problem(UpdateKind.ADAM, [50], [torch.float32] * 3)
    plain, _ = run(arguments)
    given_as_tensor, _ = run(arguments, Coefficients(), device_coefficients=torch.tensor(COEFFICIENTS))
    assert all(torch.equal(a, b) for a, b in zip(plain, given_as_tensor, strict=True))
