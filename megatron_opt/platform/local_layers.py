"""Attention and norm of `--transformer-impl local`: torch's fused attention in place of the unfused one, and norms under
sequence parallelism. The same on CPU and GPU; never run on a GPU.
"""

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.platform import attention_logits
from megatron_opt.platform.replacement import Replacement


def _attention(
    self: Any,
    query: Tensor,  # (s, b, heads, d)
    key: Tensor,  # (t, b, groups, d)
    value: Tensor,  # (t, b, groups, dv)
    attention_mask: Tensor | None,  # True where a key is hidden, broadcast to (b, heads, s, t)
    attn_mask_type: Any = None,  # Megatron's own does not look at it either
    attention_bias: Tensor | None = None,
    packed_seq_params: Any = None,
) -> Tensor:  # (s, b, heads·dv)
    """softmax(query·keyᵀ/√d) · value by torch's scaled-dot-product attention; Megatron's own forward for a softmax with offset."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.enums import AttnMaskType

    if packed_seq_params is not None or attention_bias is not None:
        raise UserError(
            "packed sequences and attention biases need Transformer Engine's attention, which needs a GPU; "
            "leave out the flag that asks for them."
        )
    softmax = self.scale_mask_softmax
    mask, causal = attention_mask, False
    if softmax.window_size is not None:
        window = _outside(len(query), len(key), tuple(softmax.window_size), query.device)
        mask = window if mask is None else mask | window
    elif mask is None and self.attn_mask_type == AttnMaskType.causal and len(query) > 1:
        assert len(query) == len(key), "a causal mask is for self-attention"
        causal = True
    scale = self.softmax_scale * (softmax.scale or 1.0)  # divided by the layer's number, then multiplied, in fp32
    attention_logits.record(self, query, key, scale, mask, causal)
    if self.softmax_offset is not None:
        if value.shape[-1] != query.shape[-1]:
            raise UserError(
                f"--softmax-type {self.config.softmax_type} with --multi-latent-attention needs Transformer Engine's "
                "attention, which needs a GPU; use vanilla."
            )
        return ATTENTION.original()(self, query, key, value, attention_mask)  # type: ignore[no-any-return]
    dropout = self.attention_dropout.p if self.training else 0.0
    shared = dropout == 0 or self.config.sequence_parallel  # where Megatron draws from the default generator
    with nullcontext() if shared else tensor_parallel.get_cuda_rng_tracker().fork():
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if mask is None else ~mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )  # (b, heads, s, dv)
    return out.permute(2, 0, 1, 3).flatten(2)


@functools.lru_cache(maxsize=4)
def _outside(queries: int, keys: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """True where a key is further back than window[0], or ahead; the last query stands at the last key."""
    if window[0] < 0 or window[1] != 0:
        raise UserError(
            f"--window-size {window[0]},{window[1]}: a causal window reaches back some tokens and ahead none; give N,0."
        )
    distance = torch.arange(queries, device=device)[:, None] + (keys - queries) - torch.arange(keys, device=device)
    return (distance < 0) | (distance > window[0])


def _norm(
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
    if config.normalization not in norms:
        raise UserError(f"--normalization {config.normalization} is not among those of torch: {', '.join(norms)}.")
    norm = norms[config.normalization](hidden_size, eps=eps)
    for param in norm.parameters():
        param.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


ATTENTION = Replacement(
    "megatron.core.transformer.dot_product_attention:DotProductAttention",
    "forward",
    _attention,
    frozenset(
        """kv_channels num_attention_heads num_query_groups apply_query_key_layer_scaling window_size window_attn_skip_freq
        attention_dropout sequence_parallel softmax_type params_dtype perform_initialization init_method
        fp16 bf16 attention_softmax_in_fp32 masked_softmax_fusion""".split()  # the last line: softmax is fused, in fp32
    ),
    constructor="__init__",
)
NORM = Replacement(
    "megatron.core.transformer.torch_norm:WrappedTorchNorm",
    "__new__",
    _norm,
    frozenset({"normalization", "sequence_parallel", "persist_layer_norm"}),  # the last names a kernel of Apex
    constructor="__new__",
)
REPLACEMENTS = (ATTENTION, NORM)
