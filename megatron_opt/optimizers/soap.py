"""SOAP: Adam in the eigenbasis of Shampoo's factors. arXiv 2409.11321; as run in arXiv 2509.02046 (`study`).

The study's form: step 1 only starts factors and bases and moves nothing; bias corrections count every step; a refresh
is due when t % frequency = 0 and uses the factors from before this step. The authors' form (`variant=authors`) does not
count step 1, refreshes when (t − 1) % frequency = 0, and uses the new factors. Where a factor is rank-deficient the
null space of its basis is filled by `eigenbasis.complete`, a function of the gradients alone.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import eigenbasis, projection
from megatron_opt.optimizers.base import Cost, MatrixInfo, State
from megatron_opt.optimizers.bases import both, follow, rotate_moments
from megatron_opt.optimizers.block_batches import SMALL
from megatron_opt.optimizers.blocks import as_matrix
from megatron_opt.optimizers.decomposition import Decomposition, decompose_or_keep
from megatron_opt.optimizers.factored import Blocks, FactoredConfig, FactoredOptimizer
from megatron_opt.optimizers.flag_coroutines import FlagCoroutine, joined
from megatron_opt.optimizers.options import choice, decay, epsilon, option
from megatron_opt.optimizers.partition import Partition
from megatron_opt.optimizers.registry import register
from megatron_opt.optimizers.soap_partition import SoapPartition


@dataclass(frozen=True)
class SoapConfig(FactoredConfig):
    """Hyperparameters of SOAP; tuned values of the study."""

    beta1: float = decay(0.95, "decay of the first moment")
    beta2: float = decay(0.99, "decay of the second moment in the eigenbasis")
    eps: float = epsilon(1e-10, "added to the square root of the second moment")
    floor: float = option(
        0.01,
        "least √v in the eigenbasis over the block's root mean square: no rounding noise scaled up; 0: the study's rule",
        low=0,
        high=1,
    )
    variant: str = choice("study", ("study", "authors"), "which form of counting and refreshing")
    power_shift: float = option(
        0.0,
        "refresh from factors plus this share of their largest eigenvalue: steadier small eigenvectors",
        low=0,
        high=100,
    )
    adaptive_tol: float = option(
        0.0, "skip a due refresh while a probe of the basis turns less than this", low=0, high=1
    )


@register
class Soap(FactoredOptimizer):
    """v ← EMA((Q_Lᵀ g Q_R)²);  m ← EMA(g);  direction = Q_L [Q_Lᵀ m Q_R /(√v + ε)] Q_Rᵀ·√(1−β2ⁿ)/(1−β1ⁿ).

    Both moments are kept in the eigenbasis; a refresh turns m from the old basis into the new one.
    """

    name: ClassVar[str] = "soap"
    Config: ClassVar[type] = SoapConfig
    block_keys: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    @property
    def authors(self) -> bool:
        """Whether step 1 does not count and refreshes see the new factors."""
        return self.config.variant == "authors"

    def seen(self, step: int) -> int:
        """Gradients in the factors that a refresh at this step sees."""
        return step if self.authors else step - 1

    def is_due(self, info: MatrixInfo, step: int) -> bool:
        return super().is_due(info, step - 1 if self.authors else step)

    def parts(self, info: MatrixInfo) -> Partition | None:
        return SoapPartition(self, info, self.tile(info), self.shard_dim(info))

    def shard_dim(self, info: MatrixInfo) -> int | None:
        """A side without a factor; of two, the longer."""
        sides = self.sides(info)
        if len(info.shape) == 1:
            return None if sides else 0
        return {0: int(info.shape[1] > info.shape[0]), 1: 1 - sum(sides)}.get(len(sides))

    # Beginning

    def begin(self, grad: Tensor, state: State, info: MatrixInfo) -> FlagCoroutine[bool]:
        """Factors of the first gradient and their bases; nothing moves. A warm start's moments are turned into them."""
        sides, grid = self.sides(info), self.grid(info)
        moved, *flags = yield torch.stack([grad.any(), *self.seeds(state, info)])
        seeded = self.seeded(flags, info)
        if not moved and any(seeded):
            return False
        moments = [as_matrix(state[key]) for key in self.block_keys]
        stacks = [grid.cut(x) for x in (grad, *moments)]
        runs = []
        for region, stack in enumerate(stacks[0]):
            factors, bases = self.factors_of(state, sides, region)

            def first(stack: Tensor = stack, bases: dict[int, Tensor] = bases) -> FlagCoroutine[dict[int, Tensor]]:
                decomposition = yield from decompose_or_keep(
                    eigenbasis.first_bases, (stack,), sides, keep=tuple(bases.values())
                )
                return dict(zip(sides, self.kept(decomposition, [info.name] * len(stack), bases=len(sides))))

            def advance(factor: Tensor, side: int, stack: Tensor = stack) -> None:
                self.advance(factor, stack, side)

            runs.append(self.begin_bases(factors, bases, seeded[region], first, advance, [info.name] * len(stack)))
        yield from joined(runs)
        for region, (_, *parts) in enumerate(zip(*stacks)):
            if seeded[region]:
                m, v = parts
                rotate_moments(m, v, self.factors_of(state, sides, region)[1])
        for parts, moment in zip(stacks[1:], moments):
            grid.join(parts, moment)
        state["ready"].fill_(float(moved))
        return False

    @staticmethod
    def factors_of(state: State, sides: Iterable[int], region: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Factors and bases of a region's blocks by side."""
        gg, q = ({side: state[f"{kind}_{region}_{side}"] for side in sides} for kind in ("gg", "q"))
        return gg, q

    def seeds(self, state: State, info: MatrixInfo) -> list[Tensor]:
        """Whether factors that have seen no gradient are a warm start's: a flag () for each side of each region."""
        regions = range(len(self.grid(info).shapes()))
        return [state[f"gg_{region}_{side}"].any() for region in regions for side in self.sides(info)]

    def seeded(self, flags: Sequence[bool], info: MatrixInfo) -> list[bool]:
        """Whether each region is, from these flags."""
        count = len(self.sides(info))
        regions = range(len(self.grid(info).shapes()))
        return [any(flags[region * count : (region + 1) * count]) for region in regions]

    def begin_bases(
        self,
        factors: dict[int, Tensor],
        bases: dict[int, Tensor],
        seeded: bool,
        first: Callable[[], FlagCoroutine[dict[int, Tensor]]],
        advance: Callable[[Tensor, int], None],
        names: Sequence[str],
    ) -> FlagCoroutine[None]:
        """First bases (B, K, K) of a stack of blocks.

        `advance` takes the first gradient into the factor of a side; `first` finds bases of that gradient alone. A warm
        start's factors have full rank: its bases are theirs.
        """
        initial = (yield from first()) if factors and not seeded else {}
        for side, factor in factors.items():
            advance(factor, side)
        if seeded:
            compute = eigenbasis.first_basis_of_factor
            sizes = {side: (basis.shape[-1], basis.dtype) for side, basis in bases.items()}
            runs = [
                decompose_or_keep(compute, (x.double(),), *sizes[side], keep=(bases[side],))
                for side, x in factors.items()
            ]
            initial = dict(zip(factors, (self.kept(each, names)[0] for each in (yield from joined(runs)))))
        for side, basis in bases.items():
            basis.copy_(initial[side])

    def kept(self, decomposition: Decomposition, names: Sequence[str], bases: int = 1) -> tuple[Tensor, ...]:
        """Its parts, the first ones bases (B, K, K); where a block failed it is counted, and a basis not yet begun is I."""
        for block in decomposition.failed:
            for basis in decomposition.parts[:bases]:
                self.failed(names[block])
                if not basis[block].any():
                    basis[block] = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
        return decomposition.parts

    # A step

    def works_in_place(self, blocks: Blocks) -> bool:
        """Native kernels do."""
        by_side = [several[0] for tensors in (blocks.factors, blocks.derived) for several in tensors.values()]
        return projection.taken([*blocks.grads, *itertools.chain(*blocks.states)], by_side)

    def block_step(self, blocks: Blocks) -> FlagCoroutine[list[Tensor]]:
        late = blocks.due and not self.authors  # the refresh sees the factors from before this step
        fused = blocks.in_place and not late  # the kernel advances factors too
        directions = blocks.grads if fused else [grad.clone() for grad in blocks.grads]
        known = {"plain": True} if blocks.in_place else {}
        self.direction(directions, blocks.states, blocks.derived, blocks.step, blocks.factors if fused else {}, **known)
        if not (fused or late):
            self.advance_factors(blocks)
        if blocks.due:
            yield from self.refresh(blocks)
        if late:
            self.advance_factors(blocks)
        return directions

    def direction(
        self,
        grads: Sequence[Tensor],
        moments: Sequence[Sequence[Tensor]],
        bases: Mapping[int, Sequence[Tensor]],
        step: int,
        factors: Mapping[int, Sequence[Tensor]] | None = None,
        **more: Any,
    ) -> None:
        """Adam's step in the eigenbasis of blocks (…, b, c), turned back, in place of gradients; moments and factors advance.

        `squares` are the mean of v in each block (B,), where gradients are strips of the blocks.
        """
        cfg = self.config
        n = max(step - 1 if self.authors else step, 1)
        scale = (1 - cfg.beta2**n) ** 0.5 / (1 - cfg.beta1**n)  # bias corrections
        first, second = moments
        lefts, rights = both(bases)
        left_factors, right_factors = both(factors or {})
        projection.project_adam(
            grads, first, second, lefts, rights, left_factors, right_factors, beta1=cfg.beta1, beta2=cfg.beta2, eps=cfg.eps,
            scale=scale, floor=cfg.floor, gain=1 - cfg.shampoo_beta, decay=cfg.shampoo_beta, **more,
        )  # fmt: skip

    def advance_factors(self, blocks: Blocks) -> None:
        """This step's gradients into all factors."""
        if blocks.in_place:
            gains = {"gain": 1 - self.config.shampoo_beta, "decay": self.config.shampoo_beta}
            return projection.advance_factors(*both(blocks.factors), blocks.grads, **gains)
        for side, (factor,) in blocks.factors.items():
            self.advance(factor, blocks.grads[0], side)

    # Refreshing

    def refresh(self, blocks: Blocks) -> FlagCoroutine[None]:
        """New bases from the factors; moments follow. Small blocks with full factors where they lie, others stacked."""
        full = all(self.seen(blocks.step) * blocks.shape[1 - side] >= blocks.shape[side] for side in blocks.factors)
        if blocks.in_place and full and self.config.adaptive_tol == 0 and max(blocks.shape) <= SMALL:
            firsts, seconds = blocks.states
            success = eigenbasis.refresh_bases(firsts, seconds, blocks.derived, blocks.factors, self.config.power_shift)
            left = (~success).nonzero().flatten().tolist()
            if not left:
                return
            blocks = blocks.select(left)
        stack = blocks.stacked()
        factors, bases = ({side: x for side, (x,) in tensors.items()} for tensors in (stack.factors, stack.derived))
        new, orders = yield from self.new_bases(factors, bases, stack.shape, stack.step, stack.names)
        self.follow([moment for (moment,) in stack.states], bases, new, orders)
        for side, basis in bases.items():
            basis.copy_(new[side])
        blocks.put_back(stack, factors=False)

    def follow(
        self,
        moments: Sequence[Tensor],
        bases: dict[int, Tensor],
        new: dict[int, Tensor],
        orders: Mapping[int, Tensor],
    ) -> None:
        """Moments (B, b, c) from old bases to new ones, in place."""
        m, v = moments
        follow(m, v, bases, new, orders)

    def new_bases(
        self,
        factors: Mapping[int, Tensor],
        bases: Mapping[int, Tensor],
        shape: tuple[int, int],
        step: int,
        names: Sequence[str],
    ) -> FlagCoroutine[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """By side of blocks of this shape: bases (B, K, K) refreshed from their factors, the order of the old columns (B, K)."""
        runs = [
            self._new_basis(factor, bases[side], self.seen(step) * shape[1 - side], step, names)
            for side, factor in factors.items()
        ]
        results = dict(zip(factors, (yield from joined(runs))))
        return {side: basis for side, (basis, _) in results.items()}, {
            side: order for side, (_, order) in results.items()
        }

    def _new_basis(
        self, factor: Tensor, basis: Tensor, rank: int, step: int, names: Sequence[str]
    ) -> FlagCoroutine[tuple[Tensor, Tensor]]:
        size = basis.shape[-1]
        order = torch.arange(size, device=basis.device).repeat(len(basis), 1)
        wide, chosen = basis.to(factor.dtype), list(range(len(basis)))
        if self.config.adaptive_tol > 0:
            count = max(4, size // 16)
            columns = (torch.arange(count, device=basis.device) * size // count + step) % size
            moved = yield eigenbasis.rotation(factor, wide, columns) > self.config.adaptive_tol
            chosen = [block for block, far in enumerate(moved) if far]
            if not chosen:
                return basis, order
        given = [factor, wide, basis, order]
        if len(chosen) < len(basis):
            given = [torch.stack([x[block] for block in chosen]) for x in given]
        rank, shift = min(rank, size), self.config.power_shift
        decomposition = yield from decompose_or_keep(
            eigenbasis.power_step, (given[0], given[1]), rank, shift, keep=(given[2], given[3])
        )
        new, columns_of = self.kept(decomposition, [names[block] for block in chosen])
        if len(chosen) < len(basis):
            parts, (new, order) = (new, columns_of), (basis.clone(), order)
            for at, block in enumerate(chosen):
                new[block], order[block] = parts[0][at], parts[1][at]
            return new, order
        return new, columns_of

    def width_exponent(self) -> float:
        """Whitened: a flat spectrum with elements of about 1, whose norm grows by √r."""
        return -0.5

    def cost(self, info: MatrixInfo) -> Cost:
        sides = self.sides(info)
        gemm, refresh, state = 0.0, {"gemm": 0.0, "qr": 0.0}, 4.0
        rows, columns = (*info.shape, 1)[:2]
        for count, *block in self.grid(info).shapes():
            for side in sides:
                size, other = block[side], block[1 - side]
                gemm += count * 6.0 * size * size * other  # factor 2, rotations of g in and of u out 4
                refresh["gemm"] += count * (4.0 * size * size * other + 2.0 * size**3)  # m to the new basis; A·Q
                refresh["qr"] += count * 8.0 / 3.0 * size**3  # geqrf 4/3 and householder_product 4/3
                state += count * size * size * self.factor_bytes
        kind = "gemm" if self.is_large(info) else "small_gemm"
        cost = Cost(
            flops={kind: gemm} if gemm else {},
            refresh=refresh if gemm else {},
            refresh_every=self.config.precondition_frequency,
            elementwise_bytes=4.0 * 16 * rows * columns,
            state_bytes=state + self.moment_bytes(rows * columns, 2),
        )
        return self.with_conversion(cost)
