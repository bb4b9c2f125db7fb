"""What Megatron-Core 0.19.2 does only on CUDA, done on the CPU: attention, norms with sequence parallelism, MoE, RNG."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _sdpa_forward(
    self: Any,
    query: Tensor,  # (s, b, heads, d)
    key: Tensor,  # (s, b, groups, d)
    value: Tensor,  # (s, b, groups, d)
    attention_mask: Tensor | None,
    attn_mask_type: Any = None,
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
    **kwargs: Any,
) -> Tensor:  # (s, b, heads·d)
    """Causal attention through torch's scaled-dot-product attention, in place of the unfused one."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.enums import AttnMaskType

    assert packed_seq_params is None, "packed sequences need Transformer Engine's attention, which needs a GPU"
    mask_type = attn_mask_type or self.attn_mask_type
    causal = mask_type == AttnMaskType.causal
    mask = None if causal or attention_mask is None else ~attention_mask
    if attention_bias is not None:
        mask, causal = attention_bias, False
    dropout = self.attention_dropout.p if self.training else 0.0
    fork = tensor_parallel.get_cuda_rng_tracker().fork() if dropout > 0 else nullcontext()
    with fork:
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )  # (b, heads, s, d)
    out = out.permute(2, 0, 1, 3)
    return out.reshape(out.shape[0], out.shape[1], -1)


def _torch_norm(
    cls: type,
    config: Any,
    hidden_size: int,
    eps: float = 1e-5,
    persist_layer_norm: bool = False,
    zero_centered_gamma: bool = False,
    normalization: str = "LayerNorm",
) -> torch.nn.Module:
    """torch's LayerNorm or RMSNorm, its parameters marked for the gradient all-reduce of sequence parallelism."""
    norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    norm = norms[config.normalization](hidden_size, eps=eps)
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def _to_list(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """all_to_all takes split sizes as lists; Megatron turns them into such only when they come from a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven(gather: Any, reduce_scatter: Any) -> tuple[Any, Any]:
    """Megatron's two functions, with unequal splits (tokens of experts cut over tensor-parallel ranks) as gloo can."""

    def gathered(input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        pieces = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(pieces, padded, group=group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    def scattered(input_: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    return gathered, scattered


def _set_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _fork(self: Any, name: str = "model-parallel-rng") -> Any:
    """The tracker's fork without its warning that the CPU generator moved: here it is the one that should."""
    from contextlib import contextmanager

    @contextmanager
    def forked() -> Any:
        if name not in self.states_:
            raise KeyError(f"RNG state {name} is not added")
        before, before_name = torch.get_rng_state(), self._current_state_name
        if before_name != "default-rng":
            self.states_[before_name] = before
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)
            self._current_state_name = before_name

    return forked()


def install() -> None:
    """Patch Megatron-Core for this process; imports it."""
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer import dot_product_attention, torch_norm
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    dataset_utils.compile_helpers = lambda: None  # the wheel carries the compiled helper
    tp_random._set_cuda_rng_state = _set_rng_state
    tp_random._get_cuda_rng_state = _get_rng_state
    tp_random.CudaRNGStatesTracker.fork = _fork
    dot_product_attention.DotProductAttention.forward = _sdpa_forward
    torch_norm.WrappedTorchNorm.__new__ = _torch_norm
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = _uneven(
        mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    )
    moe_utils.maybe_move_tensor_to_cpu = _to_list
    if hasattr(token_dispatcher, "maybe_move_tensor_to_cpu"):
        token_dispatcher.maybe_move_tensor_to_cpu = _to_list
