"""What SOAP and Shampoo share: factors G·Gᵀ and GᵀG of blocks, a matrix derived from each, and when it is refreshed."""

import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import products
from megatron_opt.optimizers.base import MatrixInfo, Shape, State, StateKind, StateSpec
from megatron_opt.optimizers.block_batches import SMALL, BlockBatch, Planner
from megatron_opt.optimizers.blocks import Grid, apart, as_matrix, batched, put_back
from megatron_opt.optimizers.flag_coroutines import FlagCoroutine, together
from megatron_opt.optimizers.narrow import NarrowOptimizer, moment_option
from megatron_opt.optimizers.options import check, choice, decay, option
from megatron_opt.optimizers.partition import Partition

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FactoredConfig:
    """Factors, blocks and refreshes; tuned values of the study (for SOAP)."""

    shampoo_beta: float = decay(0.95, "decay of the factors G·Gᵀ and GᵀG")
    precondition_frequency: int = option(10, "steps between refreshes", low=1, high=10**12)
    block_size: int = option(512, "matrices are cut into blocks of this side; 0: whole", low=0, high=10**9)
    max_precond_dim: int = option(10000, "a side this long or longer has no factor, and is not cut", low=1, high=10**12)
    precondition_vocabulary: bool = option(False, "a factor for the vocabulary's side of embedding and output too")
    one_sided: bool = option(False, "a factor for the shorter side of a matrix only")
    precondition_1d: bool = option(True, "a factor for vectors too")
    stagger: bool = option(False, "spread refreshes over steps by a hash of the matrix's name")
    factor_precision: str = choice(
        "fp32",
        ("bf16", "fp32", "fp64"),
        "dtype of the factors; fp64 keeps small eigenvectors exact; bf16: of bases and roots too",
    )
    moment_dtype: str = moment_option()

    def __post_init__(self) -> None:
        check(self)


BySide = dict[int, list[Tensor]]


@dataclass
class Blocks:
    """Equal blocks that step together, as lists with an entry (b, c) or (B, b, c) for each matrix, or one for all."""

    grads: list[Tensor]
    states: list[list[Tensor]]  # the rule's `block_keys`
    factors: BySide  # by side (k, k) or (B, k, k)
    derived: BySide  # likewise
    step: int
    due: bool
    names: list[str]  # of each block's matrix
    in_place: bool = False  # whether kernels work on the lists where they lie

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.grads[0].shape[-2], self.grads[0].shape[-1]

    def stacked(self) -> "Blocks":
        """All as one stack (B, b, c), a view where it is of one matrix."""

        def by_side(tensors: BySide) -> BySide:
            return {side: [batched(several)] for side, several in tensors.items()}

        states = [[batched(several)] for several in self.states]
        derived = by_side(self.derived)
        return replace(self, grads=[batched(self.grads)], states=states, factors=by_side(self.factors), derived=derived)

    def put_back(self, stack: "Blocks", factors: bool = True) -> None:
        """What became of the stack of these blocks: states, what is derived and, unless told otherwise, factors."""
        pairs = [*zip(stack.states, self.states), *((stack.derived[side], self.derived[side]) for side in self.derived)]
        pairs += [(stack.factors[side], self.factors[side]) for side in self.factors if factors]
        for (whole,), several in pairs:
            put_back(whole, several)

    def select(self, numbers: Sequence[int]) -> "Blocks":
        """Some blocks, each an entry of its own."""

        def chosen(several: list[Tensor]) -> list[Tensor]:
            blocks = [block for x in several for block in (x if x.ndim == 3 else (x,))]
            return [blocks[number] for number in numbers]

        factors, derived = (
            {side: chosen(x) for side, x in tensors.items()} for tensors in (self.factors, self.derived)
        )
        states, names = [chosen(x) for x in self.states], [self.names[number] for number in numbers]
        return Blocks(chosen(self.grads), states, factors, derived, self.step, self.due, names)


class FactoredOptimizer(NarrowOptimizer):
    """A rule with a factor for each side of each block; the subclass says what is derived from it and used how."""

    block_keys: ClassVar[tuple[str, ...]]  # states of the matrix's shape that a block step reads and writes
    clip: ClassVar[bool] = True
    vectors: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.failures: Counter[str] = Counter()  # decompositions that failed twice, by matrix; the old one was kept
        self.plan = Planner(self.grid, self.sides)

    def begin(self, grad: Tensor, state: State, info: MatrixInfo) -> FlagCoroutine[bool]:
        """Before a matrix's first step, its flag too; False where that step moves nothing."""
        state["ready"].fill_(float((yield grad.any().view(1))[0]))
        return True

    def works_in_place(self, blocks: Blocks) -> bool:
        """Whether `block_step` takes blocks where they lie, rather than one stack of all."""
        return False

    def block_step(self, blocks: Blocks) -> FlagCoroutine[list[Tensor]]:
        """Directions, which may replace gradients; states, factors and what is derived from them change in place."""
        raise NotImplementedError

    # Which sides, which blocks, when

    def sides(self, info: MatrixInfo) -> tuple[int, ...]:
        """Sides with a factor."""
        limit = self.config.max_precond_dim
        if len(info.shape) == 1:
            return (0,) if self.config.precondition_1d and info.shape[0] < limit else ()
        sides = tuple(side for side in (0, 1) if info.shape[side] < limit)
        if info.rows_are_tokens and not self.config.precondition_vocabulary:
            return tuple(side for side in sides if side == 1)
        if self.config.one_sided and len(sides) == 2:
            return (0,) if info.shape[0] <= info.shape[1] else (1,)
        return sides

    def grid(self, info: MatrixInfo, shape: Shape | None = None) -> Grid:
        """Blocks of the matrix, or of a slice of the given shape; a side without a factor is not cut."""
        whole = shape or (*info.shape, 1)[:2]
        sides, size = self.sides(info), self.config.block_size
        return Grid.of(whole, [size if size and side in sides else whole[side] for side in (0, 1)])

    def is_large(self, info: MatrixInfo) -> bool:
        """Whether a block fills the machine by itself."""
        return max(max(block) for _, *block in self.grid(info).shapes()) > SMALL

    def is_due(self, info: MatrixInfo, step: int) -> bool:
        """Whether this matrix is refreshed at this step: a function of name and step alone."""
        offset = zlib.crc32(info.name.encode()) if self.config.stagger else 0
        return (step + offset) % self.config.precondition_frequency == 0

    # State

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        regions = range(len(self.grid(info).shapes()))
        stacks = [f"{kind}_{region}_{side}" for region in regions for side in self.sides(info) for kind in ("gg", "q")]
        return self.moments_spec(self.moment_keys) | {"ready": StateKind.FLAG} | dict.fromkeys(stacks, StateKind.BLOCKS)

    def init_factors(self, info: MatrixInfo, device: torch.device, dtype: torch.dtype) -> State:
        """Factors of all blocks and what is derived from them."""
        state = {}
        wide, dtype = {"fp64": (torch.float64, dtype), "bf16": (torch.bfloat16, torch.bfloat16)}.get(
            self.config.factor_precision, (dtype, dtype)
        )
        for region, (count, *block) in enumerate(self.grid(info).shapes()):
            for side in self.sides(info):
                shape = (count, block[side], block[side])
                state[f"gg_{region}_{side}"] = torch.zeros(shape, dtype=wide, device=device)
                state[f"q_{region}_{side}"] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    def init_moments(self, weight: Tensor) -> State:
        """States of the weight's shape."""
        return self.moments(weight, self.moment_keys)

    @property
    def moment_keys(self) -> tuple[str, ...]:
        """States of the matrix's shape."""
        return self.block_keys

    @property
    def factor_bytes(self) -> float:
        """Bytes of an element of a factor and of what is derived from it."""
        return {"bf16": 4.0, "fp32": 8.0, "fp64": 12.0}[self.config.factor_precision]

    def init_flag(self, dtype: torch.dtype) -> State:
        """Whether the matrix has begun."""
        return {"ready": torch.zeros(1, dtype=dtype, device="cpu")}

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        moments, flag = self.init_moments(weight), self.init_flag(weight.dtype)
        return moments | flag | self.init_factors(info, weight.device, weight.dtype)

    def tile(self, info: MatrixInfo) -> tuple[int, int]:
        """A block, which steps alone: the whole of a side without a factor."""
        (_, rows, columns), *_ = self.grid(info).shapes()
        return rows, columns

    def parts(self, info: MatrixInfo) -> Partition | None:
        return FactoredPartition(self, info, self.tile(info))

    # One step on whole matrices

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        ready = torch.cat([state["ready"] for state in states]).tolist()
        new = [i for i, known in enumerate(ready) if not known]
        begun = together([self.begin(as_matrix(grads[i]), states[i], infos[i]) for i in new])
        stopped = {i for i, starts in zip(new, begun) if not starts}
        started = [i not in stopped for i in range(len(grads))]
        for grad, state, start in zip(grads, states, started):
            if start:
                self.before_blocks(grad, state)
        dues = [not known or due for known, due in zip(ready, self._all_due(infos, step))]
        plan = self.plan(grads, infos)
        cuts = {i: self._cut(grads[i], states[i], infos[i]) for i in plan.cut if started[i]}
        every, runs = [], []
        for batch in plan.batches:
            for due in (False, True):
                members = [member for member in batch.members if dues[member[0]] == due and started[member[0]]]
                if members:
                    every += members
                    runs.append(self._step_members(members, batch, grads, cuts, states, infos, step, due))
        by_region = dict(zip(every, chain.from_iterable(together(runs))))
        directions = []
        for index, (grad, state, info) in enumerate(zip(grads, states, infos)):
            if not started[index]:
                directions.append(torch.zeros_like(grad))
            elif index in cuts:
                directions.append(self._join(grad, state, info, cuts[index], by_region, index))
            else:
                directions.append(by_region[index, 0] if grad.ndim == 2 else by_region[index, 0].view(grad.shape))
        return directions

    def _all_due(self, infos: Sequence[MatrixInfo], step: int) -> list[bool]:
        if self.config.stagger:
            return [self.is_due(info, step) for info in infos]
        return [self.is_due(infos[0], step)] * len(infos) if infos else []

    def _cut(self, grad: Tensor, state: State, info: MatrixInfo) -> list[list[Tensor]]:
        """Stacks of the gradient and of the rule's `block_keys`, by region."""
        grid = self.grid(info)
        return [grid.cut(as_matrix(x)) for x in (grad, *(state[key] for key in self.block_keys))]

    def _join(
        self,
        grad: Tensor,
        state: State,
        info: MatrixInfo,
        cut: list[list[Tensor]],
        block_directions: dict[tuple[int, int], Tensor],
        index: int,
    ) -> Tensor:
        """The direction of a matrix of several blocks; its states get theirs back."""
        grid, direction = self.grid(info), torch.empty_like(grad)
        grid.join([block_directions[index, region] for region in range(len(cut[0]))], as_matrix(direction))
        for name, stacks in zip(self.block_keys, cut[1:]):
            grid.join(stacks, as_matrix(state[name]))
        return direction

    def before_blocks(self, grad: Tensor, state: State) -> None:
        """What is done to the whole matrix's state first."""

    def _step_members(
        self,
        members: list[tuple[int, int]],
        batch: BlockBatch,
        grads: Sequence[Tensor],
        cuts: dict[int, list[list[Tensor]]],
        states: Sequence[State],
        infos: Sequence[MatrixInfo],
        step: int,
        due: bool,
    ) -> FlagCoroutine[Sequence[Tensor]]:
        """One step of some regions of a batch."""
        if batch.whole:
            parts = [[as_matrix(grads[i]) for i, _ in members]]
            parts += [[as_matrix(states[i][key]) for i, _ in members] for key in self.block_keys]
        else:
            parts = [[cuts[i][which][region] for i, region in members] for which in range(1 + len(self.block_keys))]
        regions = range(1 + max(region for _, region in members))
        tensors: dict[str, BySide] = {"gg": {}, "q": {}}
        for kind, by_side in tensors.items():
            for side in batch.kind:
                keys = [f"{kind}_{region}_{side}" for region in regions]
                by_side[side] = [states[i][keys[region]] for i, region in members]
        names = batch.part(members).names(parts[0], infos)
        blocks = Blocks(parts[0], parts[1:], tensors["gg"], tensors["q"], step, due, names)
        if self.works_in_place(blocks):
            return (yield from self.block_step(replace(blocks, in_place=True)))
        stack = blocks.stacked()
        (directions,) = yield from self.block_step(stack)
        blocks.put_back(stack)
        return apart(directions, parts[0])

    def advance(self, factor: Tensor, grad: Tensor, side: int) -> None:
        """GG ← β·GG + (1−β)·g gᵀ (side 0) or gᵀg (side 1), in place."""
        beta, g = self.config.shampoo_beta, grad.to(factor.dtype)
        left, right = (g, g.mT) if side == 0 else (g.mT, g)
        products.accumulate(factor, left, right, 1 - beta, beta, symmetric=True)

    def failed(self, name: str) -> None:
        """Count and log a decomposition that failed in fp64 too."""
        self.failures[name] += 1
        log.warning("%s: decomposition failed (%d so far); the old one is kept", name, self.failures[name])


class FactoredPartition(Partition):
    """Blocks step alone, and their stacks are parts of the matrix's."""

    optimizer: FactoredOptimizer

    def block_positions(self, corner: tuple[int, int], shape: tuple[int, int]) -> dict[str, tuple[str, list[int], int]]:
        positions, whole, (row0, column0) = {}, self.optimizer.grid(self.info), corner
        for region, starts in enumerate(self.optimizer.grid(self.info, shape).starts()):
            whole_blocks = [whole.find(row0 + row, column0 + column) for row, column in starts]
            of, numbers = whole_blocks[0][0], [number for _, number in whole_blocks]
            for side in self.optimizer.sides(self.info):
                for kind in ("gg", "q"):
                    positions[f"{kind}_{region}_{side}"] = f"{kind}_{of}_{side}", numbers, whole.shapes()[of][0]
        return positions
