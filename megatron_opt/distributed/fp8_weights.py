"""Weights that the model keeps in FP8 (--fp8-param-gather): published from fp32 main copies, never read back into them.

Transformer Engine's quantized parameters say bf16 and are bytes and scales; they have no flat view. Main copies begin with the
bf16 values that the parameters had before they were quantized. After a step they are rounded to bf16, as without the flag, and
then quantized by Transformer Engine's own `cast_master_weights_to_fp8`, each rank its shard under a scale that all shards share.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_opt.distributed.param_shards import ParamShard
from megatron_opt.errors import UserError
from megatron_opt.layout.matrices import ParamView
from megatron_opt.layout.quantized import is_quantized


@dataclass
class Fp8Weights:
    """Quantized parameters of a shard group, the same in the same order on every rank, and this rank's shards of their main copies."""

    params: list[Any]
    mains: list[Tensor | None]  # None: no shard of it lies here
    starts: list[int | None]
    group: Any  # the ranks over which scales agree
    buffers: list[Any]  # Megatron's buffers that gather MXFP8 weights in bf16; of the others there are none

    @staticmethod
    def of(
        views: Iterable[ParamView], param_shards: Sequence[ParamShard], chunks: Sequence[Any], group: Any
    ) -> "Fp8Weights | None":
        """Of a shard group's parameters; None where it has none in FP8. `group`: the shard group's ranks."""
        quantized = [view for view in views if is_quantized(view.param)]
        if not quantized:
            return None
        _check(quantized[0].param, chunks[0].ddp_config)
        shard_of = {id(param_shard.view.param): param_shard for param_shard in param_shards}
        chosen = [shard_of.get(id(view.param)) for view in quantized]
        buffers = [_buffer(chunks[view.chunk], view.param) for view in quantized]
        if not _has_one_scale(quantized[0].param):  # blocks of another TP rank's shard are other blocks
            group = buffers[0].data_parallel_group
        return Fp8Weights(
            [view.param for view in quantized],
            [None if param_shard is None else param_shard.main for param_shard in chosen],
            [None if param_shard is None else param_shard.start for param_shard in chosen],
            group,
            buffers if _is_mx(quantized[0].param) else [],
        )

    def publish(self) -> None:
        """Shards of the main copies into the memory that Megatron gathers; collective over the group."""
        from megatron.core.fp8_utils import quantize_param_shard

        if not self.buffers:
            quantize_param_shard(self.params, self.mains, self.starts, self.group)
            return
        for param, main, start, buffer in zip(self.params, self.mains, self.starts, self.buffers, strict=True):
            if main is not None and start is not None:
                first = buffer.param_index_map[param][0] + start
                buffer.param_data[first : first + main.numel()].copy_(main)


def conflict(recipe: str, overlap_param_gather: bool) -> str | None:
    """The flags, among those that decide how weights in FP8 are published, that these would be published wrong with."""
    if recipe == "delayed":
        return "--fp8-recipe delayed"
    if recipe == "mxfp8" and overlap_param_gather:
        return "--overlap-param-gather with --fp8-recipe mxfp8"
    return None


def _check(param: Any, ddp_config: Any) -> None:
    """Refuse them also where flags are not this project's (the plugin)."""
    delayed = type(param._get_quantizer()).__name__ == "Float8Quantizer"
    recipe = "delayed" if delayed else "mxfp8" if _is_mx(param) else "tensorwise"
    if complaint := conflict(recipe, bool(ddp_config.overlap_param_gather)):
        raise UserError(f"--fp8-param-gather does not go with {complaint}; remove one of them.")


def _has_one_scale(param: Any) -> bool:
    return hasattr(param, "_scale_inv")


def _is_mx(param: Any) -> bool:
    from megatron.core.fp8_utils import is_mxfp8tensor

    return bool(is_mxfp8tensor(param))


def _buffer(chunk: Any, param: Any) -> Any:
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        if param in buffer.param_index_map:
            return buffer
    raise KeyError("the parameter is in no gradient buffer")
