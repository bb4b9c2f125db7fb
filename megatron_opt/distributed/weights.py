"""Directions into weights: one fused pass over this rank's shards of matrices, then the norms that some rules keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_opt.distributed.domain import Domain
from megatron_opt.distributed.elementwise import learning_rate
from megatron_opt.distributed.fragments import Rect, has_bf16_copy
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.kernels import multi_tensor
from megatron_opt.kernels.multi_tensor import Coefficients, Rule
from megatron_opt.optimizers.base import shrinkage
from megatron_opt.optimizers.groups import Group


@dataclass
class WeightStep:
    """Rectangles of a domain's matrices on this rank, by parameter group."""

    domain: Domain
    matrix: MatrixStep
    groups: Sequence[Group]
    rules: Sequence[Any]
    group_of: dict[str, int]

    def __post_init__(self) -> None:
        self.held: dict[int, list[tuple[int, Rect]]] = {}
        for index, fragment in enumerate(self.domain.fragments):
            for rect in fragment.rects:
                if rect.matrix in self.matrix.infos:
                    self.held.setdefault(self.group_of[rect.matrix], []).append((index, rect))
        self.projected = {name for name, rule in self.matrix.rules.items() if rule.projects}
        self.writes_model = {  # groups whose pass writes the model's bf16 parameters beside the main copies
            group
            for group, held in self.held.items()
            if not self.rules[group].projects and all(has_bf16_copy(self.domain.fragments[index]) for index, _ in held)
        }

    def step(self, directions: Sequence[Tensor], skip: set[str], param_groups: Sequence[dict[str, Any]]) -> None:
        """W ← W − lr·u − decay of flat directions by fragment; then the projection of rules that have one."""
        mains = [fragment.main for fragment in self.domain.fragments]
        for index, held in self.held.items():
            group, mode = param_groups[index], self.groups[index].decay_mode
            taken = [(at, rect) for at, rect in held if rect.matrix not in skip]
            lr = learning_rate(group)
            multi_tensor.update(
                Rule.APPLY,
                [rect.run(mains[at]) for at, rect in taken],
                [rect.run(directions[at]) for at, rect in taken],
                (),
                Coefficients(lr=lr, shrink=shrinkage(lr, group["weight_decay"], mode)),
                copies=[rect.run(self._model_copy(at)) for at, rect in taken] if index in self.writes_model else (),
                cautious_decay=mode == "cautious",
            )
        if self.projected:
            self.matrix.rescale(mains, self.projected - skip)

    def _model_copy(self, index: int) -> Tensor:
        copy = self.domain.fragments[index].model_copy()
        assert copy is not None  # the parameter is bf16
        return copy
