"""Many copies at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targets[i] ← sources[i], types converted: contiguous ones together, by few launches; equal memory is left alone."""
    pairs = [
        (to, of)
        for to, of in zip(targets, sources, strict=True)
        if to.data_ptr() != of.data_ptr() or to.dtype != of.dtype
    ]
    # one pair of other strides, such as a range of columns, would take all of a call's pairs off the fast way
    plain = [(to.view(-1), of.view(-1)) for to, of in pairs if to.is_contiguous() and of.is_contiguous()]
    if plain:
        torch._foreach_copy_([to for to, _ in plain], [of for _, of in plain])
    for to, of in pairs:
        if not (to.is_contiguous() and of.is_contiguous()):
            to.copy_(of)
