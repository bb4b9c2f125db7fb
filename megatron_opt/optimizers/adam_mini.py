"""Adam-mini: one second moment for each block of a weight that shares its curvature. arXiv 2406.16793."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels.block_adam import block_adam
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer, State, StateKind, StateSpec
from megatron_opt.optimizers.elementwise import adam_coefficients
from megatron_opt.optimizers.options import check, decay, epsilon
from megatron_opt.optimizers.partition import Partition
from megatron_opt.optimizers.registry import register


@dataclass(frozen=True)
class AdamMiniConfig:
    """Hyperparameters of Adam-mini; tuned values of the study."""

    beta1: float = decay(0.9, "decay of the first moment")
    beta2: float = decay(0.98, "decay of the blocks' second moments")
    eps: float = epsilon(1e-10, "added to the square root of the second moment")

    def __post_init__(self) -> None:
        check(self)


@register
class AdamMini(MatrixOptimizer):
    """m ← EMA(g);  v ← EMA(mean of g² over the block);  direction = m̂/(√v̂ + ε).

    Blocks: k by head, q by KV group, every other matrix by row (embedding and output: by token); vectors are AdamW.
    """

    name: ClassVar[str] = "adam_mini"
    Config: ClassVar[type] = AdamMiniConfig
    vectors: ClassVar[bool] = True
    clipped_kinds: ClassVar[tuple[str, ...]] = ("norm", "bias", "ssm")  # plain AdamW there

    @staticmethod
    def blocks(info: MatrixInfo) -> int:
        """Blocks of equally many rows."""
        return info.heads if info.role in ("q", "k") and len(info.shape) == 2 else info.shape[0]

    def by_rows(self, info: MatrixInfo) -> bool:
        """Whether each row is a block."""
        return self.blocks(info) == info.shape[0]

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        blocks = len(weight) if self.by_rows(info) else self.blocks(info)
        second = weight.new_zeros(blocks, *[1] * (weight.ndim - 1))
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": second}

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        return {"exp_avg": StateKind.MATRIX, "exp_avg_sq": StateKind.ROWS if self.by_rows(info) else StateKind.SHARED}

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        o = self.config
        coefficients = adam_coefficients(o.beta1, o.beta2, o.eps, step)
        moments, seconds = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        return block_adam(grads, moments, seconds, coefficients)

    def width_exponent(self) -> float:
        return -1.0

    def cost(self, info: MatrixInfo) -> Cost:
        numel = torch.Size(info.shape).numel()
        return Cost(elementwise_bytes=4.0 * 4 * numel, state_bytes=4.0 * (numel + self.blocks(info)))

    def partition(self, info: MatrixInfo) -> Partition | None:
        """Shards of whole rows need nothing of each other."""
        return Partition(self, info, shard_dim=0) if self.by_rows(info) else None
