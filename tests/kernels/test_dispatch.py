"""Choosing between native kernels and the torch reference: forced, missing, stale, and what tracing sees."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_opt.errors import UserError
from megatron_opt.kernels import (
    block_adam,
    dispatch,
    eigenbasis,
    preconditioner,
    products,
    projection,
    symmetric,
)
from megatron_opt.kernels import multi_tensor as mt

STEP = """
import sys, torch
from megatron_opt.kernels import multi_tensor as mt
p = [torch.ones(3)]
mt.update(mt.UpdateKind.APPLY, p, [torch.ones(3)], (), mt.Coefficients(lr=0.5))
mt.update(mt.UpdateKind.APPLY, p, [torch.ones(3)], (), mt.Coefficients(lr=0.25))
print(p[0].tolist(), "megatron_opt._C" in sys.modules)
"""
MISSING = "import sys; sys.modules['megatron_opt._C'] = None\n"
STALE = "import megatron_opt.kernels.dispatch as d; d.source_hash = lambda folder: 'other'\n"
OTHER_TORCH = "import megatron_opt.kernels.dispatch as d, types, sys\n" + (
    "sys.modules['megatron_opt._C'] = types.SimpleNamespace(torch_version='1.0', source_hash='')\n"
)
UNSET = ("MEGATRON_OPT_KERNELS", "MEGATRON_OPT_ISA", "RANK")
native = pytest.mark.skipif(not dispatch.native_available(), reason="the extension is not built")


def run(program, **environment):
    env = {key: value for key, value in os.environ.items() if key not in UNSET}
    return subprocess.run(
        [sys.executable, "-c", program], env=env | environment, capture_output=True, text=True, timeout=120
    )


def test_the_extension_is_built_from_these_sources():
    """What would make native tests skip, or test the reference with itself."""
    if dispatch.mode() == "reference":
        pytest.skip("MEGATRON_OPT_KERNELS=reference")
    module, defect = dispatch._load()
    assert module is not None, f"the extension {defect}; {dispatch._BUILD}"


def test_reference_never_loads_the_extension():
    result = run(STEP, MEGATRON_OPT_KERNELS="reference")
    assert (result.stdout.strip(), result.stderr) == ("[0.25, 0.25, 0.25] False", "")


@native
def test_native_is_silent():
    result = run(STEP, MEGATRON_OPT_KERNELS="native")
    assert (result.stdout.strip(), result.stderr) == ("[0.25, 0.25, 0.25] True", "")


@native
def test_a_forced_instruction_set_holds_for_every_kernel():
    """AVX2 is what processors without AVX-512 have: no products there."""
    program = "import torch; from megatron_opt.kernels import products; print(products.available(torch.zeros(1)))"
    assert run(program, MEGATRON_OPT_ISA="avx2").stdout == run(program, MEGATRON_OPT_ISA="portable").stdout == "False\n"
    assert run(program, MEGATRON_OPT_ISA="avx512").stdout == run(program).stdout
    wrong = run(program, MEGATRON_OPT_ISA="avx")
    assert "UserError: MEGATRON_OPT_ISA is 'avx'; set it to portable, avx2 or avx512" in wrong.stderr


@pytest.mark.parametrize(
    "spoiled, reason",
    [
        (MISSING, "is not built"),
        (OTHER_TORCH, f"was built for torch 1.0, this is {torch.__version__}"),
        pytest.param(STALE, "is older than csrc", marks=native),
    ],
)
def test_an_extension_that_cannot_be_used_is_named_once_and_passed_over(spoiled, reason):
    result = run(spoiled + STEP)
    assert result.stdout.startswith("[0.25, 0.25, 0.25]")
    assert result.stderr.count("\n") == 1 and reason in result.stderr and "pip install" in result.stderr


def test_a_missing_extension_is_named_by_rank_0_alone_and_refused_where_it_is_forced():
    assert run(MISSING + STEP, RANK="1").stderr == ""
    forced = run(MISSING + STEP, MEGATRON_OPT_KERNELS="native")
    assert forced.returncode != 0 and "UserError: MEGATRON_OPT_KERNELS=native, but" in forced.stderr


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("MEGATRON_OPT_KERNELS", "fast")
    with pytest.raises(UserError, match="'fast'; set it to reference or native"):
        dispatch.native_available()


def test_a_device_without_kernels_takes_the_reference(monkeypatch, capsys):
    assert not dispatch.native_available("meta")


@native
def test_operators_have_fakes_that_agree():
    def tensors(count, *shape):
        return [torch.rand(*shape) for _ in range(count)]

    assert block_adam  # it defines an operator
    c = list(mt.Coefficients(eps=1e-8))
    p, g, m, v = (tensors(2, 5, 3) for _ in range(4))
    update = (0, p, g, m, v, [], [], [], [], None, c, None, False, False, 0, 1, [], True)
    torch.library.opcheck(torch.ops.megatron_opt.multi_tensor_update.default, update)
    torch.library.opcheck(torch.ops.megatron_opt.multi_tensor_sum.default, (3, p, g, [], [], c))
    seconds = [x[:, :1].contiguous() for x in v]
    torch.library.opcheck(torch.ops.megatron_opt.block_adam.default, (g, m, seconds, p, c))


@native
@pytest.mark.skipif(not products.available(torch.zeros(1)), reason="no AVX-512 in this processor")
def test_matrix_operators_have_fakes_that_agree():
    assert eigenbasis and preconditioner and projection and symmetric  # they define operators
    a, b, eye = torch.rand(2, 4, 4).tril() + torch.eye(4), torch.rand(2, 4, 3), torch.eye(3).repeat(2, 1, 1)
    operators = torch.ops.megatron_opt
    torch.library.opcheck(operators.product.default, (torch.zeros(2, 4, 3), a, b, 1.0, 0.0, False, 1, 0))
    torch.library.opcheck(operators.solve_lower.default, (a, b))
    torch.library.opcheck(operators.cholesky_qr.default, (a, 1e-6))
    torch.library.opcheck(operators.symmetric_product.default, (a, None, 1.0, 0.0))
    parts = [[torch.rand(2, 4, 3), torch.rand(4, 3)] for _ in range(3)]
    rights, factors = [eye.clone(), eye[0].clone()], [eye.clone(), eye[0].clone()]
    torch.library.opcheck(
        operators.project_adam.default, (*parts, [], rights, [], factors, 0.9, 0.9, 1e-8, 1.0, 0.1, 0.9, 0.0)
    )
    torch.library.opcheck(operators.advance_factors.default, ([], factors, parts[0], 0.1, 0.9))
    refresh = (parts[1], parts[2], [], rights, [], factors, 0.0, 1e-7, 1e-5, 1e-5)
    torch.library.opcheck(operators.refresh_bases.default, refresh)
    moments, lefts = parts[1], [torch.eye(4).repeat(2, 1, 1), torch.eye(4)]
    torch.library.opcheck(operators.kron_step.default, (lefts, rights, moments, parts[2], [0.1, 0.1], 0.1))


@native
def test_fake_tensors_pass_through():
    with FakeTensorMode():
        params, grads = [torch.empty(4, 5)], [torch.empty(4, 5)]
        sums = mt.update(mt.UpdateKind.APPLY, params, grads, (), mt.Coefficients(), with_sums=True)
        assert sums.shape == (1, 3) and sums.dtype == torch.float64
        assert mt.sums(mt.Sum.PRODUCTS, grads, mt.Coefficients(), params=params).shape == (1, 3)
