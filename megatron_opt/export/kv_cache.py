"""Reading on: logits of further ids, where keys and values of what was read are kept by Megatron's own inference context."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# layers whose past is no list of keys and values, or whose answer for a token is no function of its past alone
_OTHER = (
    "hybrid_layer_pattern", "mtp_num_layers", "experimental_attention_variant", "linear_attention_freq",
    "moe_expert_capacity_factor", "moe_expert_rank_capacity_factor", "moe_router_force_load_balancing",
    "heterogeneous_layers_config_encoded_json",
)  # fmt: skip
_POSITIONS = ("rope", "learned_absolute", "none")


def is_kept(flags: Any) -> bool:
    """Whether keys and values say all of a model's past; else everything is read again for every token."""
    if any(getattr(flags, name, None) for name in _OTHER):
        return False
    if getattr(flags, "softmax_type", "vanilla") != "vanilla":  # Megatron's own attention masks squares
        return False
    if flags.multi_latent_attention and getattr(flags, "apply_rope_fusion", False):  # refused by Megatron
        return False
    return flags.multi_latent_attention or flags.position_embedding_type in _POSITIONS


class Reader:
    """A batch of texts that grow together: each call reads the next ids of all of them."""

    def __init__(self, forward: Callable[[Tensor, int, Any], Tensor | None], flags: Any, rows: int, length: int):
        """`forward`: logits of ids (rows, n) from a position on, in an inference context; `length`: ids of a text at most."""
        from megatron.core.inference.contexts import StaticInferenceContext

        self._forward, self._seen = forward, torch.zeros(rows, 0, dtype=torch.int64)
        self._context = StaticInferenceContext(rows, length) if is_kept(flags) else None

    def __call__(self, ids: Tensor) -> Tensor | None:
        """What `forward` gives for ids (rows, n) that follow those before: several at first, then one by one."""
        if self._context is None:
            self._seen = torch.cat([self._seen, ids], 1)
            found = self._forward(self._seen, 0, None)
            return None if found is None else found[:, -ids.shape[1] :]
        start = self._context.sequence_len_offset
        assert not start or ids.shape[1] == 1, "several ids at once would see each other"
        found = self._forward(ids, start, self._context)
        self._context.sequence_len_offset = start + ids.shape[1]
        return found
