"""Every registered optimizer on a plain model against the engine on Megatron's kind of parameters: bit for bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_opt.distributed.exchange import Exchange
from megatron_opt.distributed.param_shards import ParamShard, rectangles
from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.engine_options import EngineOptions
from megatron_opt.layout.matrices import ParamView, RegionMapping
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import assign, default_group_configs
from megatron_opt.torch import Optimizer

CPU = torch.device("cpu")
# Megatron's name and fused rows -> the torch model's name
SHAPES = {
    "tok_embeddings.weight": ((24, 12), "embedding", {}),
    "layers.0.qkv.weight": ((36, 12), "hidden", {"q": (12, 1), "k": (12, 1), "v": (12, 1)}),
    "layers.0.qkv.bias": ((36,), "bias", {"q": (12, 1), "k": (12, 1), "v": (12, 1)}),
    "layers.0.down.weight": ((12, 30), "hidden", {}),
    "layers.0.norm.weight": ((12,), "norm", {}),
    "output.weight": ((24, 12), "output", {}),
}
SPLIT = {r"qkv\.": {"q": 12, "k": 12, "v": 12}}
LR, DECAY, CLIP = 1e-2, 0.1, 0.5
OPTIONS: dict[str, dict[str, Any]] = {"prodigy": {"d0": 1.0}}  # four steps find no rate


def _weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) / 3 for name, (shape, _, _) in SHAPES.items()}


def _gradients(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=draw) for name, (shape, _, _) in SHAPES.items()}


def _megatron(name: str, steps: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The engine as Megatron has it: gradients in `main_grad`, a shard group of parameter shards."""
    from megatron_opt.distributed.megatron_optimizer import MegatronShardedOptimizer

    param_shards, infos = [], {}
    params = {}
    for param_name, weight in _weights().items():
        shape, kind, parts = SHAPES[param_name]
        cols = shape[1] if len(shape) > 1 else 1
        pieces, row = [], 0
        for suffix, (rows, _) in (parts or {"": (shape[0], 1)}).items():
            full = f"{param_name}.{suffix}" if suffix else param_name
            infos[full] = MatrixInfo(full, (rows, cols) if len(shape) > 1 else (rows,), kind, suffix)
            pieces.append(RegionMapping(full, row, rows, 0, 0))
            row += rows
        params[param_name] = param = torch.nn.Parameter(weight.to(dtype))
        view = ParamView(param_name, param, shape[0], cols, pieces, False, True)
        main = param.detach().view(-1) if dtype == torch.float32 else param.detach().view(-1).clone().float()
        param_shards.append(ParamShard(view, 0, param.numel(), main, rectangles(view, 0, param.numel())))
    holdings = [[(i, rect) for i, param_shard in enumerate(param_shards) for rect in param_shard.rects]]
    shard_group = ShardGroup("", None, 0, 1, param_shards, holdings, infos, Exchange(None, 0, 1), own_device=CPU)
    config: Any = SimpleNamespace(lr=LR, weight_decay=DECAY, clip_grad=CLIP, log_num_zeros_in_grad=False)
    chunk = SimpleNamespace(ddp_config=SimpleNamespace(use_distributed_optimizer=False, overlap_param_gather=False))
    groups = assign(
        [infos[n] for n in sorted(infos)], default_group_configs(name, {name: OPTIONS.get(name, {})}), "decoupled"
    )
    optimizer = MegatronShardedOptimizer(config, [chunk], [shard_group], groups, EngineOptions())
    for group, made in zip(optimizer.param_groups, groups):
        group["weight_decay"] = made.decay(DECAY)  # as Megatron's scheduler does
    for step in range(steps):
        for param_name, grad in _gradients(step).items():
            params[param_name].main_grad = grad.to(dtype).float()  # type: ignore[attr-defined]
        optimizer.step()
    return {key: param.detach() for key, param in params.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(registry.optimizers()))
def test_a_plain_model_gets_the_updates_of_a_megatron_job(name: str, dtype: torch.dtype) -> None:
    params = {key: torch.nn.Parameter(weight.to(dtype)) for key, weight in _weights().items()}
    optimizer = Optimizer(
        params.items(), name, lr=LR, weight_decay=DECAY, clip_grad=CLIP, split=SPLIT, **OPTIONS.get(name, {})
    )
    for step in range(4):
        for key, grad in _gradients(step).items():
            params[key].grad = grad.to(dtype)
        optimizer.step()
        for key, grad in _gradients(step).items():
            kept = params[key].grad
            assert kept is not None and torch.equal(kept, grad.to(dtype)), "the user's gradient"
    for key, value in _megatron(name, 4, dtype).items():
        assert torch.equal(params[key].detach(), value), key
        assert not torch.equal(value, _weights()[key].to(dtype)), key
