"""Weights depend on seed, name and place alone: slices are slices of the whole, statistics are the distribution's."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_opt.training.initialization import _fill, initialize, normal, uniform


def whole(rows: int, cols: int, name: str = "a", seed: int = 1) -> torch.Tensor:
    out = torch.empty(rows, cols)
    _fill(out, seed, name, 0, 0, cols, 1.0, None)
    return out


@pytest.mark.parametrize("row, col, rows, cols", [(0, 0, 7, 5), (3, 2, 4, 3), (6, 4, 1, 1)])
def test_a_slice_is_a_slice_of_the_whole(row, col, rows, cols):
    part = torch.empty(rows, cols)
    _fill(part, 1, "a", row, col, 5, 1.0, None)
    assert torch.equal(part, whole(7, 5)[row : row + rows, col : col + cols])


def test_more_rows_leave_the_first_ones_alone():
    assert torch.equal(whole(40, 8)[:33], whole(33, 8))


def test_chunks_do_not_show(monkeypatch):
    expected = whole(300, 7)
    monkeypatch.setattr("megatron_opt.training.initialization._CHUNK", 50)
    assert torch.equal(whole(300, 7), expected)


def test_names_and_seeds_give_other_numbers():
    one = whole(64, 64)
    for other in (whole(64, 64, name="b"), whole(64, 64, seed=2)):
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert abs(float(correlation)) < 0.06


def test_uniform_is_uniform():
    u = uniform(3, "x", torch.arange(200_000))
    assert 0 < float(u.min()) and float(u.max()) < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi2 = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi2 < 45  # 19 degrees of freedom: 1 in 1,000
    assert abs(float(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1])) < 0.01


def test_normal_has_the_moments_of_a_normal_distribution():
    z = normal(4, "x", torch.arange(400_000))
    assert abs(float(z.mean())) < 0.006
    assert abs(float(z.std()) - 1) < 0.005
    assert abs(float((z**4).mean()) - 3) < 0.06


def test_truncation_is_at_three_sigmas_and_keeps_the_rest():
    z = normal(4, "x", torch.arange(400_000), truncate=3.0)
    assert float(z.abs().max()) <= 3
    # variance of a normal cut at 3 sigmas: 1 − 2·3·φ(3)/(Φ(3) − Φ(−3))
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    variance = 1 - 6 * density / math.erf(3 / math.sqrt(2))
    assert abs(float(z.var()) - variance) < 0.006


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_norm_fused_into_a_linear_layer_starts_as_a_norm(monkeypatch, zero_centered):
    """Filled with zeros like a bias it would silence attention and MLP."""
    from megatron.core import parallel_state as ps

    for name in ("expert_model_parallel_rank", "tensor_model_parallel_rank"):
        monkeypatch.setattr(ps, f"get_{name}", lambda: 0)
    monkeypatch.setattr(ps, "get_tensor_model_parallel_world_size", lambda: 1)
    config = SimpleNamespace(
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=4,
        gated_linear_unit=False,
        layernorm_zero_centered_gamma=zero_centered,
    )
    layer = torch.nn.Module()
    for path in ("self_attention.linear_qkv", "mlp.linear_fc1"):
        outer, inner = path.split(".")
        layer.add_module(outer, torch.nn.Module())
        linear = torch.nn.Module()
        for part in ("weight", "bias"):
            linear.register_parameter(f"layer_norm_{part}", torch.nn.Parameter(torch.full((8,), 7.0)))
        layer.get_submodule(outer).add_module(inner, linear)
    initialize([layer], config, 1, "megatron")
    for name, param in layer.named_parameters():
        assert bool((param == (1 if name.endswith("weight") and not zero_centered else 0)).all()), name
