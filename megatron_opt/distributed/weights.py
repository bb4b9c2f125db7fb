"""Directions into weights: one fused pass over this rank's shards of matrices, then the norms that some rules keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_opt.distributed.elementwise import learning_rate
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.param_shards import Rect, has_bf16_copy
from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.kernels import multi_tensor
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers.base import decay_factor
from megatron_opt.optimizers.groups import Group


@dataclass
class WeightStep:
    """Rectangles of a shard group's matrices on this rank, by parameter group."""

    shard_group: ShardGroup
    matrix: MatrixStep
    groups: Sequence[Group]
    group_optimizers: Sequence[Any]
    group_of: dict[str, int]

    def __post_init__(self) -> None:
        self.rects_of: dict[int, list[tuple[int, Rect]]] = {}
        for index, param_shard in enumerate(self.shard_group.param_shards):
            for rect in param_shard.rects:
                if rect.matrix in self.matrix.infos:
                    self.rects_of.setdefault(self.group_of[rect.matrix], []).append((index, rect))
        self.projected = {name for name, optimizer in self.matrix.optimizers.items() if optimizer.projects}
        self.writes_model = {  # groups whose pass writes the model's bf16 parameters beside the main copies
            group
            for group, rects in self.rects_of.items()
            if not self.group_optimizers[group].projects
            and all(has_bf16_copy(self.shard_group.param_shards[index]) for index, _ in rects)
        }

    def step(self, directions: Sequence[Tensor], skip: set[str], param_groups: Sequence[dict[str, Any]]) -> None:
        """W ← W − lr·u − decay of flat directions by parameter shard; then the projection of rules that have one."""
        mains = [param_shard.main for param_shard in self.shard_group.param_shards]
        for index, rects in self.rects_of.items():
            group, mode = param_groups[index], self.groups[index].decay_mode
            taken = [(at, rect) for at, rect in rects if rect.matrix not in skip]
            lr = learning_rate(group)
            multi_tensor.update(
                UpdateKind.APPLY,
                [rect.run(mains[at]) for at, rect in taken],
                [rect.run(directions[at]) for at, rect in taken],
                (),
                Coefficients(lr=lr, decay_factor=decay_factor(lr, group["weight_decay"], mode)),
                copies=[rect.run(self._model_copy(at)) for at, rect in taken] if index in self.writes_model else (),
                cautious_decay=mode == "cautious",
            )
        if self.projected:
            self.matrix.rescale(mains, self.projected - skip)

    def _model_copy(self, index: int) -> Tensor:
        copy = self.shard_group.param_shards[index].model_copy()
        assert copy is not None  # the parameter is bf16
        return copy
