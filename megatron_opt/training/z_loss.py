"""`--z-loss-coeff c`: c·log²Z beside each token's cross entropy, Z the softmax's denominator over the vocabulary (arXiv 2204.02311).

The cross entropy is log Z − z[label], which every layout computes, so that log Z is it plus the label's logit. The loss that is
reported stays the cross entropy, as with the routers' losses; evaluations and Sophia's curvature have no z-loss.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def install(coefficient: float, chunks: list[Any]) -> list[Any]:
    """Put the z-loss behind the cross entropy of the chunk that has the output layer; the chunks."""
    for chunk in chunks:
        if getattr(chunk, "post_process", False):
            entropy = functools.partial(type(chunk).compute_language_model_loss, chunk)
            chunk.compute_language_model_loss = functools.partial(_losses, chunk, entropy, coefficient)
    return chunks


def _losses(
    head: Any, entropy: Callable[[Tensor, Tensor], Tensor], coefficient: float, labels: Tensor, logits: Tensor
) -> Tensor:
    """Cross entropy (b, s) of labels (b, s) and this rank's logits (s, b, v/t); the gradient is that of the sum with the z-loss."""
    if not head.training:
        return entropy(labels, logits)
    of_label = _label_logits(labels, logits, head.tp_group)  # before the cross entropy, which overwrites fp32 logits
    losses = entropy(labels, logits)
    z = coefficient * (losses + of_label).square()
    return losses + (z - z.detach())


def _label_logits(labels: Tensor, logits: Tensor, group: Any) -> Tensor:
    """z[label], fp32 (b, s), on every rank of the group."""
    from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

    local = logits.shape[-1]
    place = labels.transpose(0, 1).reshape(-1) - group.rank() * local
    here = (place >= 0) & (place < local)
    rows = torch.arange(len(place), device=place.device)
    mine = logits.reshape(-1, local)[rows, place.clamp(0, local - 1)].float() * here
    whole = reduce_from_tensor_model_parallel_region(mine, group=group)
    return whole.view(logits.shape[:2]).transpose(0, 1)
