"""Every native operation on the GPU against float64, and its random bits against the CPU's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opt.kernels import multi_tensor as mt
from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.kernels import philox, quantize
from megatron_opt.kernels.block_adam import block_adam
from megatron_opt.kernels.multi_tensor import Coefficients, Sum, UpdateKind
from megatron_opt.kernels.symmetric import symmetric_product
from tests.kernels import test_multi_tensor as cpu

SIZES = [5, 4096, 1, 70000, 0, 2049, *[257] * 300]  # more tensors than one launch takes


def _on(device: torch.device, arguments: Any) -> Any:
    return cpu.mapped(lambda tensor: tensor.to(device), arguments)


def _run(arguments: Any, coefficients: Coefficients = cpu.COEFFICIENTS, **options: Any) -> tuple[list[Tensor], Tensor]:
    found, sums = cpu.run(arguments, coefficients, **options)
    return [x.cpu() for x in found], sums.cpu()


@pytest.mark.parametrize("cautious_decay", [False, True])
@pytest.mark.parametrize("kind", list(UpdateKind))
def test_updates_are_float64s(kernels: torch.device, kind: UpdateKind, cautious_decay: bool) -> None:
    arguments = cpu.problem(kind, SIZES, [torch.float32] * 3, scaled=True)
    ours, sums = _run(_on(kernels, arguments), cautious_decay=cautious_decay)
    wide = cpu.mapped(torch.Tensor.double, arguments)
    wide["copies"] = arguments["copies"] if kind != UpdateKind.MOMENTUM else wide["copies"]
    theirs, wide_sums = _run(wide, cautious_decay=cautious_decay)
    for a, b in zip(ours, theirs, strict=True):
        tolerance = 2e-6 if a.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance / 4)
    torch.testing.assert_close(sums, wide_sums, rtol=1e-7, atol=0)


@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_mixed_types_and_misaligned_tensors_are_the_references(
    kernels: torch.device, types: tuple[torch.dtype, torch.dtype], offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in UpdateKind:
        arguments = cpu.decided(cpu.problem(kind, [33000, 2049, 7], [*types, types[0]], offset))
        theirs, _ = cpu.run_reference(monkeypatch, arguments)
        ours, _ = _run(_on(kernels, arguments))
        cpu.assert_near(ours, theirs)


@pytest.mark.parametrize("kind", list(Sum))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_float64s(kernels: torch.device, kind: Sum, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    made = [[cpu.tensor(size, dtype, 1, 1.0, generator) for size in (70_000, 1, 0, 2049)] for _ in range(3)]
    params, grads, states = made
    inputs: dict[str, Any] = {"params": params if kind == Sum.PRODUCTS else ()}
    inputs["states"] = states if kind in (Sum.CAUTIOUS_MASK, Sum.MARS_NORM) else ()
    here = {key: [t.to(kernels) for t in value] for key, value in inputs.items()}
    ours = mt.sums(kind, [g.to(kernels) for g in grads], cpu.COEFFICIENTS, **here).cpu()
    wide = {key: [t.double() for t in value] for key, value in inputs.items()}
    theirs = mt.sums(kind, [g.double() for g in grads], cpu.COEFFICIENTS, **wide)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2.0 if kind == Sum.CAUTIOUS_MASK else 1e-6)


def test_random_bits_are_the_cpus(device: torch.device, kernels: torch.device) -> None:
    there = philox.draws(2**40 + 5, 7, 2, 2**33 + 1, 4099, device).cpu()
    assert torch.equal(there, philox.draws(2**40 + 5, 7, 2, 2**33 + 1, 4099, torch.device("cpu")))
    options = {"stochastic": True, "seed": 2**40 + 5, "step": 7, "element_offsets": [3, 2**33 + 1]}
    c = Coefficients(
        lr=1.0, beta1=0.0, input_weight1=1.0, beta2=0.0, input_weight2=1.0
    )  # no product to contract: the same fp32
    for kind in (UpdateKind.APPLY, UpdateKind.LION):
        arguments = cpu.problem(kind, [5000, 3], [torch.bfloat16, torch.float32, torch.bfloat16], seed=2)
        for a, b in zip(_run(_on(kernels, arguments), c, **options)[0], _run(arguments, c, **options)[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("stochastic", [False, True])
def test_8_bit_codes_are_the_cpus(kernels: torch.device, stochastic: bool) -> None:
    c = Coefficients(beta1=0.0, input_weight1=1.0, beta2=0.0, input_weight2=1.0)
    g = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    found = []
    for device in (kernels, torch.device("cpu")):
        codes, absmax = torch.zeros(5000, dtype=torch.int8, device=device), torch.zeros(3, device=device)
        options: dict[str, Any] = {"stochastic": stochastic, "seed": 4, "step": 9, "element_offsets": [2]}
        mt.update(
            UpdateKind.LION,
            [torch.zeros(5000, device=device)],
            [g.to(device)],
            [[codes]],
            c,
            absmax=[[absmax], ()],
            **options,
        )
        found.append((codes.cpu(), absmax.cpu()))
    assert torch.equal(found[0][1], found[1][1])
    differs = (found[0][0].int() - found[1][0].int()).abs()
    assert differs.max() <= 1 and (differs > 0).sum() <= 2  # a value on the border between two codes
    assert torch.isfinite(quantize.decode(found[0][0], found[0][1])).all()


def test_adam_mini_is_float64s(kernels: torch.device) -> None:
    from tests.kernels import test_block_adam as mini

    arguments = mini.problem([(64, 64), (3, 1), (1, 17), (12, 100), (2, 2049), (40, 1100)])
    exact = mini.run([[x.double() for x in part] for part in arguments])
    grads, moments, seconds = ([x.to(kernels) for x in part] for part in arguments)
    ours = [*block_adam(grads, moments, seconds, mini.C), *moments, *seconds]
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("shape", [(128, 256), (3, 200, 136), (1000, 72), (2, 1024, 512)])
def test_symmetric_products_are_float64s(device: torch.device, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a = torch.randn(shape).bfloat16()
    d = (a.float() @ a.float().mT / shape[-1]).bfloat16()
    for given, beta in ((None, 0.0), (d, -2.0)):
        exact = 0.5 * (a.double() @ a.double().mT) + (beta * d.double() if given is not None else 0.0)
        ours = symmetric_product(a.to(device), None if given is None else given.to(device), 0.5, beta).cpu()
        assert torch.equal(ours, ours.mT)
        torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-7 * float(exact.abs().amax()) / 8)


@pytest.mark.parametrize("shape", [(64, 64), (100, 340), (384, 128)])
@pytest.mark.parametrize("precision, bound", [("medium", 0.05), ("high", 5e-5)])
def test_orthogonalization_is_float64s(
    device: torch.device, shape: tuple[int, int], precision: str, bound: float
) -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for _ in range(3)]
    table = ((3.4445, -4.775, 2.0315),) * 5
    exact = ns.orthogonalize([m.double() for m in matrices], table, precision="high")
    ours = ns.orthogonalize([m.to(device) for m in matrices], table, precision=precision)
    for a, b in zip(ours, exact, strict=True):
        assert (a.cpu().double() - b).norm() / b.norm() < bound
