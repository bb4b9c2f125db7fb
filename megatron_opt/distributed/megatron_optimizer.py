"""The engine as Megatron's training loop sees it: gradients and parameters in Megatron's buffers, checkpoints in its format."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.distributed.sharded_optimizer import ShardedOptimizer
from megatron_opt.distributed.state import common_state, load_state, sharded_state
from megatron_opt.engine_options import EngineOptions
from megatron_opt.layout.quantized import loaded_values
from megatron_opt.optimizers.groups import Group


class MegatronShardedOptimizer(ShardedOptimizer, MegatronOptimizer):
    """Steps what Megatron's buffers hold, whole or as the distributed optimizer's shard.

    Megatron's scheduler sets every group's `lr` and `weight_decay`; it knows no factor on the first, so steps take
    `learning_rate`.
    """

    is_stub_optimizer = False
    chained_optimizers: tuple[Any, ...] = ()  # asked by Megatron's loop for MXFP8 weights, which `zero_grad` lays here

    def __init__(
        self,
        config: Any,
        chunks: Sequence[Any],
        shard_groups: Sequence[ShardGroup],
        groups: Sequence[Group],
        options: EngineOptions | None = None,
    ) -> None:
        MegatronOptimizer.__init__(self, _Groups(), config)
        ShardedOptimizer.__init__(self, shard_groups, groups, options, clip_grad=config.clip_grad)
        self.model_chunks = list(chunks)
        self.distributed = bool(chunks[0].ddp_config.use_distributed_optimizer)
        self.overlap_param_gather = bool(chunks[0].ddp_config.overlap_param_gather)
        self._scale_one = torch.ones(1, dtype=torch.float32, device=self.device)
        self.param_groups = self._make_param_groups()

    def _make_param_groups(self) -> list[dict[str, Any]]:
        made = []
        for index, group in enumerate(self.groups):
            params = [
                param_shard.main
                for shard_group in self.shard_groups
                for param_shard in shard_group.param_shards
                if any(self.group_of[rect.matrix] == index for rect in param_shard.rects)
            ]
            made.append(
                {
                    "params": params,
                    "name": group.name,
                    "lr": self.config.lr or 0.0,
                    "weight_decay": self.config.weight_decay,
                    "lr_scale": group.lr_scale,
                    "is_expert_parallel": False,
                    "default_config": index == 0,  # whose learning rate Megatron logs
                    **_decay_of(group),
                }
            )
        return made

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    def get_loss_scale(self) -> Tensor:
        return self._scale_one

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop autograd's own gradients; the main ones are zeroed with Megatron's buffers."""
        for param_shard in self.param_shards():
            param_shard.view.param.grad = None
        for post in self.post_steps:
            post.begin()
        for weights in self._late_weights():
            weights.publish_late()

    def prepare_model_params_for_param_sync(self) -> None:
        """Before Megatron gathers weights outside a forward pass, whose gathers it would have waited for."""
        for weights in self._late_weights():
            weights.publish()

    def prepare_grads(self) -> bool:
        return False

    def step_with_ready_grads(self) -> bool:
        return bool(self.step()[0])

    def step(self) -> tuple[bool, float, float | None]:
        """Update all parameters and publish them; returns (True, gradient norm, zeros or None)."""
        zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        grad_norm = self.update()
        self._send_weights(now=not self.overlap_param_gather)
        return True, grad_norm, zeros

    def reload_model_params(self, state_dict: Any = None) -> None:
        """Take the model's parameters as the new main copies (after a load without optimizer state).

        Of those in FP8 the checkpoint's own values, which Megatron's load passes on as `state_dict`.
        """
        loaded = loaded_values(self.model_chunks, state_dict) if self._fp8_weights() else {}
        for param_shard in self.param_shards():
            param = param_shard.view.param
            if param.dtype != torch.float32:
                values = loaded[id(param)] if param_shard.quantized else param.detach().view(-1)
                param_shard.main.copy_(values[param_shard.start : param_shard.stop])
        if self.step_number == 0:
            self.forget_states()
        self.publish_fp8()

    def _fp8_weights(self) -> list[Any]:
        return [shard_group.fp8_weights for shard_group in self.shard_groups if shard_group.fp8_weights is not None]

    def _late_weights(self) -> list[Any]:
        """Weights in FP8 that share memory with gradients, and are gathered by the next forward pass."""
        return [weights for weights in self._fp8_weights() if self.overlap_param_gather and weights.through_gradients]

    def publish_fp8(self) -> None:
        """Weights in FP8 from the main copies, on every rank whole; outside a step, where nothing else is to be published."""
        if self._fp8_weights():
            self.publish()

    def publish(self) -> None:
        """All weights from the main copies, on every rank whole; outside a step."""
        for param_shard in self.param_shards():
            param_shard.publish()
        self._send_weights(now=True)

    def _send_weights(self, now: bool) -> None:
        """Weights in FP8 from the main copies, and all to all ranks: now, or by gathers of the next forward pass."""
        late = [] if now else self._late_weights()
        for weights in self._fp8_weights():
            if weights not in late:
                weights.publish()
        if self.distributed and now:
            for chunk in self.model_chunks:
                chunk.start_param_sync(force_sync=True)

    # Checkpoints: see state.py

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        return common_state(self)

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return sharded_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_state(self, state_dict)
        self.publish_fp8()


def _decay_of(group: Group) -> dict[str, float]:
    """Megatron's scheduler keys: the run's weight decay, none, or a value of the group's own."""
    if isinstance(group.weight_decay, bool):
        return {"wd_mult": float(group.weight_decay)}
    return {"wd_mult": 1.0, "start_wd": group.weight_decay, "end_wd": group.weight_decay}


class _Groups:
    """What Megatron reaches through `optimizer.optimizer`: the parameter groups."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Any, Any] = {}
