"""What of Transformer Engine's and Megatron's Python asks for a GPU, answered on the CPU; the attention of TEDotProductAttention."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.platform import attention_logits

_CAPABILITY = (9, 0)  # the layers then choose the layouts of Hopper


def install() -> None:
    """Import Transformer Engine, drop its demands for a GPU, give Megatron's wrapper an attention."""
    torch.cuda.get_device_capability = lambda device=None: _CAPABILITY
    properties = torch.cuda.get_device_properties()
    properties.major, properties.minor = _CAPABILITY
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule as Base

    Base.__init__ = rewritten(Base.__init__, "not torch.cuda.is_available()", "False")
    Base.prepare_forward = rewritten(Base.prepare_forward, "not inp.is_cuda", "False")
    from transformer_engine.pytorch import distributed, quantization

    distributed._one_after_another = _one_after_another
    for gather in ("_start_all_gather_fp8_blockwise", "_all_gather_mxfp8"):
        coalesced = rewritten(
            getattr(distributed, gather), "torch.distributed._coalescing_manager", "_one_after_another"
        )
        setattr(distributed, gather, coalesced)
    quantization._FP8_BLOCK_SCALING_SUPPORT = quantization._MXFP8_SUPPORT = (
        True,
        "",
    )  # other GPUs' formats, emulated too
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    TEDotProductAttention.forward = attention
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer.dist_all_gather_func = _gathered_bytes
    MCoreSavePlanner.resolve_data = _plain(MCoreSavePlanner.resolve_data)


def _plain(resolve: Callable[..., Any]) -> Callable[..., Any]:
    """Weights in FP8 are saved as the numbers that they stand for, which Megatron does of those on a GPU alone."""

    def resolve_data(planner: Any, item: Any) -> Any:
        from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

        data = resolve(planner, item)
        return data.dequantize() if isinstance(data, QuantizedTensor) else data

    return resolve_data


def _gathered_bytes(output: Tensor, shard: Tensor, **options: Any) -> Any:
    """An all-gather of bytes: gloo turns what is gathered at once, FP8 and bf16, into one type."""
    return torch.distributed.all_gather_single(output.view(torch.uint8), shard.view(torch.uint8), **options)


@contextmanager
def _one_after_another(**options: Any) -> Iterator[Any]:
    """In place of gathers at once of numbers and scales, which gloo turns into one type; they are done when they return."""
    yield SimpleNamespace(wait=lambda: None)


def rewritten(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """The function compiled again from its source with one expression replaced, which must stand in it once."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, (
        f"{function.__qualname__} has changed: {old!r} stands {source.count(old)} times in it"
    )
    if "super().__init__" in source:
        source = source.replace("super().__init__", "torch.nn.Module.__init__.__get__(self)")
    names: dict[str, Any] = {}
    exec(compile(source.replace(old, new), inspect.getsourcefile(function) or "", "exec"), function.__globals__, names)
    return names[function.__name__]  # type: ignore[no-any-return]


def attention(
    self: Any,
    query: Tensor,  # (s, b, heads, d)
    key: Tensor,  # (s, b, groups, d)
    value: Tensor,  # (s, b, groups, dv)
    attention_mask: Tensor | None,
    attn_mask_type: Any,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
    num_splits: int | None = None,
) -> Tensor:  # (s, b, heads·dv)
    """softmax(query·keyᵀ·scale) · value under a causal mask; with context parallelism over the gathered keys and values."""
    _check(self, attention_bias, packed_seq_params)
    group = self.cp_group if self.config.context_parallel_size > 1 else None
    mask: Tensor | None = None
    causal = attn_mask_type.name == "causal" and len(query) > 1
    if group is not None:
        mine = positions(group.rank(), group.size(), len(query))
        everyone = torch.cat([positions(rank, group.size(), len(key)) for rank in range(group.size())])
        key, value = gathered(key, group), gathered(value, group)
        mask, causal = everyone[None, :] <= mine[:, None] if causal else None, False
    elif attn_mask_type.name not in ("causal", "no_mask"):
        mask = None if attention_mask is None else ~attention_mask
    attention_logits.record(self, query, key, self.softmax_scale, None if mask is None else ~mask, causal)
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=causal,
        scale=self.softmax_scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )  # (b, heads, s, dv)
    return out.permute(2, 0, 1, 3).flatten(2)


def _check(self: Any, attention_bias: Tensor | None, packed_seq_params: Any) -> None:
    config = self.config
    refused = {
        "--softmax-type": config.softmax_type != "vanilla",
        "--window-size": config.window_size is not None,
        "--attention-dropout": config.attention_dropout > 0 and self.training,
        "packed sequences": packed_seq_params is not None,
        "attention biases": attention_bias is not None,
    }
    for what, used in refused.items():
        if used:
            raise UserError(
                f"{what}: Transformer Engine's attention on CPU does not know it; leave it out (dropout: 0)."
            )


def positions(rank: int, size: int, length: int) -> Tensor:
    """Places in the sequence of a context-parallel rank's `length` tokens: of 2·size equal runs it has the rank-th from either end."""
    half = length // 2
    first = torch.arange(half)
    return torch.cat([first + rank * half, first + (2 * size - 1 - rank) * half])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.contiguous()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def gathered(x: Tensor, group: Any) -> Tensor:
    """The ranks' x one after another along its first dimension; its gradient is the sum of theirs."""
    return _Gather.apply(x, group)  # type: ignore[no-any-return]
