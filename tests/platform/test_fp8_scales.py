"""Scales of the FP8 that the CPU emulates, against arithmetic that shares nothing with them."""

import math

import numpy as np
import pytest
import torch

from megatron_opt.platform.transformer_engine.scales import e8m0, encode, reciprocal, scale_from_amax

AMAX = torch.exp(torch.linspace(-75, 75, 20001))


@pytest.mark.parametrize("largest", [448.0, 57344.0])
def test_a_scale_is_one_division(largest: float) -> None:
    """As IEEE rounds it: number · (1/x), which torch makes of number / x, is another number now and then."""
    wanted = np.float32(largest) / AMAX.numpy()
    assert (scale_from_amax(AMAX, largest).numpy() == wanted).all()
    assert (largest / AMAX).ne(torch.from_numpy(wanted)).any()  # what this holds off


@pytest.mark.parametrize("largest", [448.0, 57344.0])
def test_a_scale_of_a_power_of_two_is_rounded_down(largest: float) -> None:
    actual = scale_from_amax(AMAX, largest, powers_of_two=True).tolist()
    wanted = [2.0 ** math.floor(math.log2(float(q))) for q in np.float32(largest) / AMAX.numpy()]
    assert actual == wanted


def test_maxima_without_a_scale() -> None:
    found = scale_from_amax(torch.tensor([0.0, torch.inf, torch.nan, 1e-38]), 448.0)
    assert found[:3].tolist() == [1.0, 1.0, 1.0] and float(found[3]) == torch.finfo(torch.float32).max


def test_e8m0_is_rounded_up() -> None:
    amax = torch.cat([AMAX, torch.tensor([448.0, 448.0 * 2**-100, 449.0])])
    quotient = amax.numpy() * np.float32(1 / 448)
    wanted = [math.ceil(math.log2(float(q))) + 127 for q in quotient]
    assert e8m0(amax, 448.0).tolist() == wanted
    assert e8m0(torch.tensor([0.0, torch.inf, torch.nan, 1e-37]), 448.0).tolist()[:3] == [0, 254, 255]
    exponents = torch.arange(256).to(torch.uint8)
    factors = reciprocal(exponents).double().tolist()
    assert factors[:255] == [2.0 ** (127 - e) for e in range(255)] and math.isnan(factors[255])


def test_a_cast_rounds_to_even_and_saturates() -> None:
    x = torch.tensor([1.0625, 1.1875, 500.0, -torch.inf, 2.0**-10, 3 * 2.0**-10])
    actual = encode(x, torch.ones(()), 7).view(torch.float8_e4m3fn).float().tolist()
    assert actual == [1.0, 1.25, 448.0, -448.0, 0.0, 2.0**-8]
