"""Narrow state: what rounding leaves of a basis, that it does not grow, and that widening alone changes nothing."""

import pytest
import torch

from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.narrow import widened

ULP = 2.0**-9  # half the distance between two bf16 numbers, relative
RULES = ("soap", "kl_soap", "shampoo", "kron", "dion")


def _run(name: str, steps: int, **options: str):
    optimizer, info = registry.build(name, options), MatrixInfo("w", (48, 80))
    state = optimizer.init_state(torch.randn(info.shape, generator=torch.Generator().manual_seed(1)), info)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        (direction,) = optimizer.update([torch.randn(info.shape, generator=generator)], [state], step, [info])
    return state, direction


def test_a_basis_is_off_by_one_rounding_however_often_it_is_refreshed() -> None:
    for steps in (10, 60):
        state, _ = _run("soap", steps, factor_precision="bf16")
        for side in (0, 1):
            basis = state[f"q_0_{side}"][0].double()
            assert state[f"q_0_{side}"].dtype == torch.bfloat16
            oblique = float((basis.mT @ basis - torch.eye(len(basis))).norm()) / len(basis) ** 0.5
            assert 1e-4 < oblique < 2 * ULP


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_widening_and_rounding_again_changes_nothing(name: str, dtype: str) -> None:
    factors = {} if name == "dion" else {"factor_precision": "bf16"}
    state, _ = _run(name, 12, moment_dtype=dtype, **factors)
    before = {key: tensor.clone() for key, tensor in state.items()}
    with widened([state], torch.float32) as (wide,):
        assert all(
            tensor.dtype in (torch.float32, torch.float64) for key, tensor in wide.items() if "absmax" not in key
        )
    for key, tensor in before.items():
        if key.endswith("_absmax"):  # 127·(absmax/127) is a rounding away
            torch.testing.assert_close(state[key], tensor, rtol=2**-22, atol=0)
        else:
            assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", RULES)
def test_a_narrow_step_is_the_wide_one_rounded(name: str) -> None:
    """From the same state: the direction to the bit, the state's fp32 numbers to the nearest."""
    factors = {} if name == "dion" else {"factor_precision": "bf16"}
    narrow, _ = _run(name, 8, moment_dtype="bf16", **factors)
    wide = {key: tensor.float().clone() for key, tensor in narrow.items()}
    info, grad = MatrixInfo("w", (48, 80)), torch.randn(48, 80, generator=torch.Generator().manual_seed(9))
    ours = registry.build(name, {"moment_dtype": "bf16", **factors}).update([grad.clone()], [narrow], 9, [info])[0]
    theirs = registry.build(name, {}).update([grad.clone()], [wide], 9, [info])[0]
    assert torch.equal(ours, theirs)
    assert all(torch.equal(narrow[key].float(), wide[key].to(narrow[key].dtype).float()) for key in narrow)


def test_a_step_that_fails_leaves_the_state() -> None:
    state, _ = _run("soap", 3, factor_precision="bf16", moment_dtype="bf16")
    before = {key: tensor.clone() for key, tensor in state.items()}
    with pytest.raises(RuntimeError, match="broken"), widened([state], torch.float32) as (wide,):
        wide["exp_avg"].fill_(7)
        raise RuntimeError("broken")
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())
