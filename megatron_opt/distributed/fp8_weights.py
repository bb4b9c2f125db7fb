"""Weights that the model keeps in FP8 (--fp8-param-gather): published from fp32 main copies, never read back into them.

Transformer Engine's quantized parameters say bf16 and are bytes and scales; they have no flat view. Main copies begin with the
bf16 values that the parameters had before they were quantized. After a step they are rounded to bf16, as without the flag, and
then quantized by Transformer Engine's own `cast_master_weights_to_fp8`, each rank its shard under a scale that all shards share.
MXFP8 weights travel in bf16 through the memory of the gradients, and every rank quantizes them whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_opt.distributed.param_shards import ParamShard
from megatron_opt.layout.matrices import ParamView
from megatron_opt.layout.quantized import forget_amax, is_quantized


@dataclass(eq=False)
class Fp8Weights:
    """Quantized parameters of a shard group, the same in the same order on every rank, and this rank's shards of their main copies."""

    params: list[Any]
    mains: list[Tensor | None]  # None: no shard of it lies here
    starts: list[int | None]
    group: Any  # the ranks over which scales agree
    chunks: list[Any]  # Megatron's, that hold each
    through_gradients: bool  # MXFP8: gathered in bf16 where gradients lie

    @staticmethod
    def of(
        views: Iterable[ParamView], param_shards: Sequence[ParamShard], chunks: Sequence[Any], group: Any
    ) -> "Fp8Weights | None":
        """Of a shard group's parameters; None where it has none in FP8. `group`: the shard group's ranks."""
        quantized = [view for view in views if is_quantized(view.param)]
        if not quantized:
            return None
        shard_of = {id(param_shard.view.param): param_shard for param_shard in param_shards}
        chosen = [shard_of.get(id(view.param)) for view in quantized]
        first = quantized[0]
        if not _has_one_scale(first.param):  # blocks of another TP rank's shard are other blocks
            group = _buffer(chunks[first.chunk], first.param).data_parallel_group
        return Fp8Weights(
            [view.param for view in quantized],
            [None if param_shard is None else param_shard.main for param_shard in chosen],
            [None if param_shard is None else param_shard.start for param_shard in chosen],
            group,
            [chunks[view.chunk] for view in quantized],
            _is_mx(first.param),
        )

    def publish(self) -> None:
        """Shards of the main copies into the memory that Megatron gathers; collective over the group."""
        if self.through_gradients:
            for index in range(len(self.params)):
                self._lay(index)
            return
        from megatron.core.fp8_utils import quantize_param_shard

        for param in self.params:
            forget_amax(param)
        quantize_param_shard(self.params, self.mains, self.starts, self.group)

    def publish_late(self) -> None:
        """MXFP8 under --overlap-param-gather: main copies into the zeroed gradients, of the parameters that the next pass gathers.

        What a forced gather has brought since the last step is not gathered again, and would stay among the gradients.
        """
        for index, (param, chunk) in enumerate(zip(self.params, self.chunks, strict=True)):
            gathers = bool(chunk.remove_forward_pre_hook_handles)  # the passes do; not in the first step
            if gathers and not chunk.param_to_bucket_group[param].param_gather_dispatched:
                self._lay(index)

    def _lay(self, index: int) -> None:
        main, start = self.mains[index], self.starts[index]
        if main is not None and start is not None:
            buffer = _buffer(self.chunks[index], self.params[index])
            first = buffer.param_index_map[self.params[index]][0] + start
            buffer.param_data[first : first + main.numel()].copy_(main)


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
