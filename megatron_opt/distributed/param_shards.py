"""What a rank holds: a flat interval of each local parameter, and the rectangles of logical matrices inside it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_opt.layout.matrices import ParamView
from megatron_opt.layout.quantized import initial_values, is_quantized
from megatron_opt.layout.region import Region


@dataclass(frozen=True, order=True)
class Rect:
    """A region of a matrix, contiguous in a parameter shard from `offset`."""

    matrix: str
    region: Region
    offset: int = 0

    @property
    def numel(self) -> int:
        return self.region.numel

    def run(self, flat: Tensor) -> Tensor:
        """Its elements of a flat tensor of the parameter shard."""
        return flat[self.offset : self.offset + self.numel]

    @property
    def key(self) -> tuple[str, Region]:
        """Equal for what is the same of the model, wherever it lies."""
        return self.matrix, self.region


def rectangles(view: ParamView, start: int, stop: int) -> list[Rect]:
    """Cut elements [start, stop) of a row-major parameter into rectangles: a partial row, whole rows, a partial row."""
    c = view.cols
    rects = []
    for mapping in view.mappings:
        low, high = max(start, mapping.local_row * c), min(stop, (mapping.local_row + mapping.rows) * c)
        while low < high:
            row, col = divmod(low, c)
            if col or high - low < c:
                rows, width = 1, min(c - col, high - low)
            else:
                rows, width = (high - low) // c, c
            first, left = mapping.row + row - mapping.local_row, mapping.col + col
            region = Region(first, first + rows, left, left + width)
            rects.append(Rect(mapping.matrix, region, low - start))
            low += rows * width
    return rects


@dataclass(eq=False)
class ParamShard:
    """This rank's interval [start, stop) of one parameter: its fp32 main copy, gradient and what is kept beside them.

    `state`: flat tensors by name, whatever rule trains the parameter; the rules' own lie with their steps.
    """

    view: ParamView
    start: int
    stop: int
    main: Tensor  # flat, fp32; a view of the parameter itself where that is fp32
    rects: list[Rect]
    state: dict[str, Tensor] = field(default_factory=dict)
    quantized: bool = False  # the parameter is FP8: published by fp8_weights.py alone

    def has_grad(self) -> bool:
        """Whether the parameter got a gradient."""
        return getattr(self.view.param, "main_grad", None) is not None or self.view.param.grad is not None

    def grad(self) -> Tensor | None:
        """The reduced gradient of the interval in fp32, or None where the parameter got none.

        Of fp32 buffers it is Megatron's own memory, which a step may overwrite.
        """
        grad = getattr(self.view.param, "main_grad", None)
        if grad is None:
            grad = self.view.param.grad
        if grad is None:
            return None
        return grad.view(-1)[self.start : self.stop].float()

    def model_copy(self) -> Tensor | None:
        """The interval of the model's own parameter, in its type, where that is not the main copy and not FP8."""
        param = self.view.param
        return None if self.quantized or param.dtype == torch.float32 else param.data.view(-1)[self.start : self.stop]

    def publish(self) -> None:
        """Write the main copy back to the model's parameter where the two are distinct."""
        if (copy := self.model_copy()) is not None:
            copy.copy_(self.main)


def has_bf16_copy(param_shard: ParamShard) -> bool:
    """Whether the model's own parameter is bf16, which a kernel may write beside the main copy."""
    copy = param_shard.model_copy()
    return copy is not None and copy.dtype == torch.bfloat16


def _interval(param: Tensor, buffers: Iterable[Any]) -> tuple[int, int]:
    """The part of a parameter that Megatron's reduce-scatter leaves on this rank."""
    for buffer in buffers:
        if param not in buffer.param_index_map:
            continue
        first, last, bucket_id = buffer.param_index_map[param]
        bucket = buffer.buckets[bucket_id]
        shard = bucket.grad_data.numel() // buffer.data_parallel_group.size()
        low = bucket.offset + buffer.data_parallel_group.rank() * shard
        start, stop = max(first, low), min(last, low + shard)
        return (start - first, stop - first) if start < stop else (0, 0)
    raise KeyError("the parameter is in no gradient buffer")


def make_param_shards(views: Iterable[ParamView], chunks: list[Any], distributed: bool) -> list[ParamShard]:
    """Parameter shards of this rank; whole parameters without the distributed optimizer, and empty ones left out."""
    param_shards = []
    for view in views:
        param, start, stop = view.param, 0, view.param.numel()
        if distributed:
            chunk = chunks[view.chunk]
            start, stop = _interval(param, chunk.buffers + chunk.expert_parallel_buffers)
        if start == stop:
            continue
        quantized = is_quantized(param)
        shard = (initial_values(param) if quantized else param.detach().view(-1))[start:stop]
        main = shard if param.dtype == torch.float32 else shard.clone().float()
        param.main_param, param.main_param_sharded = main, distributed  # type: ignore[attr-defined]
        param_shards.append(ParamShard(view, start, stop, main, rectangles(view, start, stop), quantized=quantized))
    return param_shards
