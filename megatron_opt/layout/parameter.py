"""A parameter of the whole model."""

import math
from dataclasses import dataclass

from megatron_opt.errors import UserError


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model: its global name, whole shape, the side that tensor parallelism cuts.

    `layer` is the decoder's, -1 before the first and `layers` after the last; `copy`: another stage has it too.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None = None
    layer: int = 0
    expert: int | None = None
    copy: bool = False

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    def local_shape(self, shards: int) -> tuple[int, ...]:
        """Shape on one of `shards` tensor-parallel ranks."""
        if self.cut is None:
            return self.shape
        if self.shape[self.cut] % shards:
            raise UserError(
                f"{self.name} has {self.shape[self.cut]} rows or columns, which {shards} ranks cannot share."
            )
        return tuple(side // shards if i == self.cut else side for i, side in enumerate(self.shape))

    def local_elements(self, shards: int) -> float:
        """Elements on one of `shards` tensor-parallel ranks."""
        return self.numel / (shards if self.cut is not None else 1)
