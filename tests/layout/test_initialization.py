"""Every model starts from the same weights on one rank and on tensor-parallel or expert-parallel ones."""

import math
from typing import Any

import pytest
import torch

from megatron_opt import platform
from megatron_opt.distributed import meta_model
from megatron_opt.layout.matrices import declare
from megatron_opt.training.initialization import initialize, ssm_values, uniform
from tests.layout import stand_ins
from tests.layout.megatron import arguments
from tests.layout.models import MODELS


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Any:
    platform.activate()
    with pytest.MonkeyPatch.context() as patch:
        stand_ins.install(patch)
        yield


def _allocate(chunk: torch.nn.Module) -> None:
    """Memory for parameters on `meta`, with what Megatron says of them."""
    for module in chunk.modules():
        for name, param in module._parameters.items():
            if param is not None:
                made = torch.nn.Parameter(torch.full(param.shape, math.nan, dtype=param.dtype))
                made.__dict__.update(param.__dict__)
                module._parameters[name] = made


def _start(args: Any, world: int, **sizes: int) -> dict[str, torch.Tensor]:
    """Whole logical matrices from all ranks of a world; ranks that hold the same must agree."""
    found: dict[str, torch.Tensor] = {}
    for rank in range(world):
        with meta_model.pretended_world(rank, world, **sizes):
            chunks = meta_model.build_chunks(args, 0, **sizes)
            for chunk in chunks:
                _allocate(chunk)
            initialize(chunks, chunks[0].config, 7, "megatron")
            declaration = declare(chunks, chunks[0].config)
        for view in declaration.views:
            local = view.param.detach().view(view.rows, view.cols)
            for piece in view.mappings:
                height, width = (*declaration.matrices[piece.matrix].shape, 1)[:2]
                whole = found.setdefault(piece.matrix, torch.full((height, width), math.nan))
                block = local[piece.local_row : piece.local_row + piece.rows]
                place = whole[piece.row : piece.row + piece.rows, piece.col : piece.col + view.cols]
                assert bool((place.isnan() | (place == block)).all()), view.name
                place.copy_(block)
    assert not any(bool(value.isnan().any()) for value in found.values())
    return found


@pytest.mark.parametrize(
    "name", ["gpt2", "output-gate", "mla-q", "mtp", "moe-shared-gate", "hybrid-moe", "hybrid-mamba"]
)
def test_layouts_start_from_the_same_weights(name: str) -> None:
    words = MODELS[name]
    args = arguments(words)
    one = _start(args, 1)
    for sizes in [{"tp": 2, "etp": 2}, *([{"ep": 2}] if "num-experts" in words else [])]:
        two = _start(args, 2, **sizes)
        assert sorted(two) == sorted(one)
        assert all(torch.equal(two[key], value) for key, value in one.items())
    norms = [value for key, value in one.items() if "norm" in key and key.endswith("weight")]
    assert norms and all(bool((value == 1).all()) for value in norms)


def test_mambas_vectors_are_distributed_as_megatron_draws_them() -> None:
    u = uniform(1, "x", torch.arange(100_000))
    a, dt = ssm_values("A_log", u).exp(), torch.nn.functional.softplus(ssm_values("dt_bias", u))
    conv = ssm_values("conv", u)
    assert float(a.min()) >= 1 and float(a.max()) <= 16 and float(a.mean()) == pytest.approx(8.5, rel=0.01)
    assert float(dt.min()) >= 1e-3 * 0.999 and float(dt.max()) <= 0.1 * 1.001
    assert float(dt.log().mean()) == pytest.approx(math.log(0.01), rel=0.01)  # even in the logarithm
    assert float(conv.abs().max()) <= 0.5 and float(conv.std()) == pytest.approx(1 / math.sqrt(12), rel=0.01)
    assert bool((ssm_values("D", u) == 1).all())
