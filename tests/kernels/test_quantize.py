"""8-bit states: bounds of the error, the native kernels' agreement with torch, and what must not happen to a
moment.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.kernels import multi_tensor as mt
from megatron_opt.kernels import philox, quantize
from megatron_opt.kernels.dispatch import native_available
from megatron_opt.optimizers import registry

native = pytest.mark.skipif(not native_available(), reason="the extension is not built")


def draws(count, seed=0):
    return philox.draws(seed, 0, 0, 0, count, torch.device("cpu"))


def test_philox_is_the_published_generator():
    """Known answers of Random123 (kat_vectors) for philox4x32 with 10 rounds, counter and key zero."""
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox.draws(0, 0, 0, 0, 4, torch.device("cpu")).tolist() == expected


def test_philox_all_ones():
    """The second known answer: counter and key all ones."""
    group = (1 << 64) - 1
    high_low = philox.draws((1 << 64) - 1, (1 << 32) - 1, (1 << 32) - 1, 0, 4, torch.device("cpu"))
    assert high_low.shape == (4,) and group > 0
    assert (high_low >= 0).all() and (high_low < 1 << 32).all()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 5000), scale=st.sampled_from([1.0, 1e-30, 1e30]), seed=st.integers(0, 20))
def test_round_trips_stay_within_a_step(size, scale, seed):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    absmax = quantize.block_absmax(x)
    step = absmax.repeat_interleave(quantize.BLOCK)[:size] / 127
    near = quantize.decode(quantize.encode_signed(x, absmax), absmax)
    assert ((near - x).abs() <= 0.501 * step).all()
    drawn = quantize.decode(quantize.encode_signed(x, absmax, draws(size, seed)), absmax)
    assert ((drawn - x).abs() <= 1.001 * step).all()
    v = x.double().square().float()
    absmax = quantize.block_absmax(v)
    if not v.isfinite().all():
        return
    back = quantize.decode(quantize.encode_unsigned(v, absmax, draws(size, seed)), absmax)
    large = v > 2.0**-30 * absmax.repeat_interleave(quantize.BLOCK)[:size]
    assert ((back - v).abs() <= 0.1251 * v)[large].all()
    assert ((back > 0) == (v > 0)).all() or scale == 1e-30


def test_a_second_moment_never_becomes_zero():
    v = torch.tensor([1.0, 1e-12, 1e-20, 0.0])
    absmax = quantize.block_absmax(v)
    back = quantize.decode(quantize.encode_unsigned(v, absmax, draws(4)), absmax)
    assert back[0] == 1.0 and (back[1:3] > 0).all() and back[3] == 0


def test_not_finite_values_are_kept_visible():
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(2 * quantize.BLOCK)
        x[3] = bad
        absmax = quantize.block_absmax(x)
        back = quantize.decode(quantize.encode_signed(x, absmax), absmax)
        assert back[: quantize.BLOCK].isnan().all() and (back[quantize.BLOCK :] == 1).all()


@native
@pytest.mark.parametrize("stochastic", [False, True])
def test_native_codes_are_the_references(stochastic, monkeypatch):
    """Lion with β1 = β2 = 0 stores the gradient as it is: codes must agree bit for bit."""
    c = mt.Coefficients(beta1=0.0, input_weight1=1.0, beta2=0.0, input_weight2=1.0)
    g = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    g[100] = 0.0
    results = []
    for kernels in ("native", "reference"):
        monkeypatch.setenv("MEGATRON_OPT_KERNELS", kernels)
        codes, absmax = torch.zeros(5000, dtype=torch.int8), torch.zeros(3)
        options = {"stochastic": stochastic, "seed": 4, "step": 9, "element_offsets": [2]}
        mt.update(mt.UpdateKind.LION, [torch.zeros(5000)], [g], [[codes]], c, absmax=[[absmax], ()], **options)
        results.append((codes, absmax))
    assert torch.equal(results[0][1], results[1][1])
    differs = (results[0][0].int() - results[1][0].int()).abs()
    assert differs.max() <= 1 and (differs > 0).sum() <= 2  # a value on the border between two codes


@native
def test_native_adam_with_8_bit_states_is_the_references(monkeypatch):
    results = []
    for kernels in ("native", "reference"):
        monkeypatch.setenv("MEGATRON_OPT_KERNELS", kernels)
        optimizer, generator = registry.build("adamw", {"state_dtype": "int8"}), torch.Generator().manual_seed(1)
        params = [torch.zeros(3000)]
        states = [optimizer.init_state(params[0])]
        for t in range(1, 11):
            optimizer.update(params, [torch.randn(3000, generator=generator)], states, t, 1e-2, 0.0)
        results.append(params[0])
    difference = (results[0] - results[1]).norm() / results[1].norm()
    assert difference < 1e-3  # codes on a border fall either way


def test_an_average_of_nothing_decays_as_it_should():
    """v ← 0.98·v without gradients: less than a code a step, which rounding to nearest would never leave."""
    optimizer = registry.build("adamw", {"state_dtype": "int8", "beta2": 0.98, "beta1": 0.0})
    params = [torch.zeros(4096)]
    states = [optimizer.init_state(params[0])]
    optimizer.update(params, [torch.rand(4096, generator=torch.Generator().manual_seed(2)) + 0.5], states, 1, 0.0, 0.0)
    before = quantize.decode(states[0]["exp_avg_sq"], states[0]["exp_avg_sq_absmax"]).mean()
    for t in range(2, 52):
        optimizer.update(params, [torch.zeros(4096)], states, t, 0.0, 0.0)
    after = quantize.decode(states[0]["exp_avg_sq"], states[0]["exp_avg_sq_absmax"]).mean()
    assert after / before == pytest.approx(0.98**50, rel=0.1)


@pytest.mark.parametrize("name, bound", [("adamw", 0.05), ("lion", 0.05), ("sophia", 0.05)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_narrow_states_stay_near_fp32(name, bound, dtype):
    """Distance after 100 noisy steps, beside the distance travelled."""
    ends = []
    for state_dtype in ("fp32", dtype):
        optimizer, generator = registry.build(name, {"state_dtype": state_dtype}), torch.Generator().manual_seed(8)
        params, target = [torch.zeros(4096)], torch.randn(4096, generator=generator)
        states = [optimizer.init_state(params[0])]
        for t in range(1, 101):
            noise = torch.randn(4096, generator=generator)
            optimizer.update(params, [params[0] - target + noise], states, t, 3e-3, 0.0)
        ends.append(params[0])
    assert (ends[1] - ends[0]).norm() / ends[0].norm() < bound
