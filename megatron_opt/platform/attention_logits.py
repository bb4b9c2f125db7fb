"""The largest attention logit of each head in a training step, recorded where attention is computed here.

`--qk-clip` and `--log-max-attention-logit` ask for it. Megatron's wrapper of Transformer Engine's attention keeps the same under
the same name, from kernels that give it; torch's attention gives none, so the logits are computed once more, block by block.
"""

from typing import Any

import torch
from torch import Tensor

NAME = "current_max_attn_logits"  # Megatron's, on the module: (heads of this rank,)
_ELEMENTS = 2**22  # logits at a time: 16 MiB


def wanted(config: Any) -> bool:
    """Whether the model's configuration asks for maxima."""
    return bool(config.qk_clip or config.log_max_attention_logit)


def record(
    module: Any, query: Tensor, key: Tensor, scale: float, hidden: Tensor | None = None, causal: bool = False
) -> None:
    """Take one microbatch's maxima into the module's; arguments as for `maxima`.

    Nothing is recorded in evaluation, nor in the first of a recomputed layer's two passes, which keeps no gradients.
    """
    if not wanted(module.config) or not module.training or not torch.is_grad_enabled():
        return
    largest, past = maxima(query, key, scale, hidden, causal), getattr(module, NAME, None)
    setattr(module, NAME, largest if past is None else torch.maximum(past, largest))


@torch.no_grad()
def maxima(
    query: Tensor,  # (s, b, heads, d)
    key: Tensor,  # (t, b, groups, d)
    scale: float,
    hidden: Tensor | None = None,  # True where a key is hidden, broadcast to (b, heads, s, t)
    causal: bool = False,
) -> Tensor:  # (heads,)
    """max over batch and visible pairs of scale·q·k, in fp32 (fp64 for fp64 inputs); NaN where one is."""
    (length, batch, heads, width), (keys, _, groups, _) = query.shape, key.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    k = key.permute(1, 2, 3, 0).to(wide)  # (b, groups, d, t)
    q = query.permute(1, 2, 0, 3).to(wide).view(batch, groups, heads // groups, length, width)
    if hidden is not None:
        hidden = hidden.expand(*hidden.shape[:-2], length, keys)
    rows = max(1, min(length, _ELEMENTS // (batch * heads * keys)))
    largest = query.new_full((heads,), -torch.inf, dtype=wide)
    for first in range(0, length, rows):
        stop = min(length, first + rows)
        seen = stop if causal else keys
        block = q[:, :, :, first:stop].reshape(batch, groups, -1, width) @ k[..., :seen]
        block = block.view(batch, heads, stop - first, seen).mul_(scale)
        if causal:
            ahead = torch.ones(stop - first, seen, dtype=torch.bool, device=block.device).triu_(first + 1)
            block.masked_fill_(ahead, -torch.inf)
        if hidden is not None:
            block.masked_fill_(hidden[..., first:stop, :seen], -torch.inf)
        largest = torch.maximum(largest, block.amax((0, 2, 3)))
    return largest
