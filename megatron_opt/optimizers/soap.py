"""SOAP: Adam in the eigenbasis of Shampoo's factors. arXiv 2409.11321; as run in arXiv 2509.02046 (`study`).

The study's form: step 1 only starts factors and bases and moves nothing; bias corrections count every step; a refresh
is due when t % frequency = 0 and uses the factors from before this step. The authors' form (`variant=authors`) does not
count step 1, refreshes when (t − 1) % frequency = 0, and uses the new factors. Where a factor is rank-deficient the
null space of its basis is filled by `eigenbasis.complete`, a function of the gradients alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import eigenbasis, projection
from megatron_opt.optimizers.base import Cost, MatrixInfo, State
from megatron_opt.optimizers.bases import both, reorder, turn, turn_in
from megatron_opt.optimizers.blocks import as_matrix, batched, put_back
from megatron_opt.optimizers.factored import Blocks, FactoredConfig, FactoredOptimizer, Held, guarded
from megatron_opt.optimizers.families import SMALL, Family
from megatron_opt.optimizers.options import choice, decay, epsilon, option
from megatron_opt.optimizers.registry import register
from megatron_opt.optimizers.slices import Leg, SliceStep, shares, to_first


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

    def begin(self, grad: Tensor, state: State, info: MatrixInfo) -> bool:
        """Factors of the first gradient and their bases; nothing moves. A warm start's moments are turned into them."""
        sides, grid = self.sides(info), self.grid(info)
        if not grad.any() and self._is_seeded(state, info):
            return False
        moments = [as_matrix(state[key]) for key in self.block_keys]
        stacks = [grid.cut(x) for x in (grad, *moments)]
        for region, (stack, m, v) in enumerate(zip(*stacks)):
            factors = {side: state[f"gg_{region}_{side}"] for side in sides}
            seeded = any(bool(factor.any()) for factor in factors.values())
            found = guarded(eigenbasis.first_bases, (stack,), sides) if sides and not seeded else []
            for which, (side, factor) in enumerate(factors.items()):
                self.advance(factor, stack, side)
                bases = [result and result[which] for result in found] or self._bases_of(factor, m.dtype)
                self._keep(state[f"q_{region}_{side}"], bases, [info.name] * len(stack))
            if seeded:
                turn_in(m, v, {side: state[f"q_{region}_{side}"] for side in sides})
        for parts, moment in zip(stacks[1:], moments):
            grid.join(parts, moment)
        state["ready"].fill_(float(grad.any()))
        return False

    def _is_seeded(self, factors: State, info: MatrixInfo) -> bool:
        """Whether factors that have seen no gradient are a warm start's."""
        regions = range(len(self.grid(info).shapes()))
        return any(bool(factors[f"gg_{region}_{side}"].any()) for region in regions for side in self.sides(info))

    def _bases_of(self, factor: Tensor, dtype: torch.dtype) -> list[Any]:
        """First bases of a warm start: its factors have full rank."""
        size = factor.shape[-1]
        return guarded(lambda a: eigenbasis.first_basis_of_factor(a, size, dtype), (factor.double(),))

    def _keep(self, basis: Tensor, found: Sequence[Any], names: Sequence[str]) -> Tensor:
        """New bases into `basis` (B, K, K) where they were found; the order of columns (B, K)."""
        size = basis.shape[-1]
        order = torch.arange(size, device=basis.device).repeat(len(basis), 1)
        for block, result in enumerate(found):
            if result is None:
                self.failed(names[block])
                if not basis[block].any():
                    basis[block] = torch.eye(size, dtype=basis.dtype, device=basis.device)
            elif isinstance(result, tuple):
                basis[block], order[block] = result
            else:
                basis[block] = result
        return order

    def _refresh(self, factor: Tensor, basis: Tensor, rank: int, step: int, names: Sequence[str]) -> Tensor:
        """Refresh bases (B, K, K) in place from their factors; the order of the old columns (B, K)."""
        size = basis.shape[-1]
        wide, chosen = basis.to(factor.dtype), torch.arange(len(basis))
        if self.config.adaptive_tol > 0:
            count = max(4, size // 16)
            columns = (torch.arange(count, device=basis.device) * size // count + step) % size
            turned = eigenbasis.rotation(factor, wide, columns)
            chosen = (turned > self.config.adaptive_tol).nonzero().flatten().cpu()
        order = torch.arange(size, device=basis.device).repeat(len(basis), 1)
        if not len(chosen):
            return order
        everything = len(chosen) == len(basis)
        picked = (factor, wide) if everything else (factor[chosen], wide[chosen])
        found = guarded(eigenbasis.power_step, picked, min(rank, size), self.config.power_shift)
        for block, result in zip(chosen.tolist(), found):
            order[block] = self._keep(basis[block : block + 1], [result], names[block : block + 1])[0]
        return order

    def family_step(
        self, family: Family, parts: list[list[Tensor]], held: Held, step: int, due: bool, infos: Sequence[MatrixInfo]
    ) -> Sequence[Tensor]:
        """Native kernels work on each block where it lies; directions may replace gradients."""
        grads, moments, seconds = parts
        if not projection.taken([*grads, *moments, *seconds], [several[0] for several in held.values()]):
            return super().family_step(family, parts, held, step, due, infos)
        bases, factors = ({side: held[kind, side] for side in family.kind} for kind in ("q", "gg"))
        gains: dict[str, Any] = {"gain": 1 - self.config.shampoo_beta, "decay": self.config.shampoo_beta}
        late = due and not self.authors  # the refresh sees the factors from before this step
        directions = [grad.clone() for grad in grads] if late else grads
        lefts, rights = both(bases)
        left_factors, right_factors = both({} if late else factors)
        projection.project_adam(
            directions, moments, seconds, lefts, rights, left_factors, right_factors,
            **self._adam(step), **gains, plain=True,
        )  # fmt: skip
        if due:
            self._refresh_family(family, moments, seconds, bases, factors, step, family.names(grads, infos))
        if late:
            projection.advance_factors(*both(factors), grads, **gains)
        return directions

    def _refresh_family(
        self,
        family: Family,
        moments: Sequence[Tensor],
        seconds: Sequence[Tensor],
        bases: Mapping[int, Sequence[Tensor]],
        factors: Mapping[int, Sequence[Tensor]],
        step: int,
        names: Sequence[str],
    ) -> None:
        """Small blocks with full factors where they lie, others and those that this leaves stacked."""
        lists = [moments, seconds, *bases.values(), *factors.values()]
        full = all(self.seen(step) * family.shape[1 - side] >= family.shape[side] for side in family.kind)
        if full and self.config.adaptive_tol == 0 and max(family.shape) <= SMALL:
            found = eigenbasis.refresh_bases(moments, seconds, bases, factors, self.config.power_shift)
            left = (~found).nonzero().flatten().tolist()
            if not left:
                return
            blocks = [[block for x in several for block in (x if x.ndim == 3 else (x,))] for several in lists]
            lists, names = [[several[i] for i in left] for several in blocks], [names[i] for i in left]
        moment, second, *rest = stacks = [batched(several) for several in lists]
        turned = dict(zip(family.kind, rest)), dict(zip(family.kind, rest[len(family.kind) :]))
        self._refresh_stack(moment, second, *turned, step, names)
        for stack, several in zip(stacks[: 2 + len(family.kind)], lists):
            put_back(stack, several)

    def block_step(self, blocks: Blocks) -> Tensor:
        moment, second = blocks.states
        direction = self._direction(blocks.grad, moment, second, blocks.derived, blocks.step)
        if self.authors:
            self._advance_all(blocks)
        if blocks.due:
            self._refresh_stack(moment, second, blocks.derived, blocks.factors, blocks.step, blocks.names)
        if not self.authors:
            self._advance_all(blocks)
        return direction

    def _refresh_stack(
        self,
        moment: Tensor,
        second: Tensor,
        bases: dict[int, Tensor],
        factors: dict[int, Tensor],
        step: int,
        names: Sequence[str],
    ) -> None:
        """New bases of a stack of blocks; its moments (B, b, c) follow them."""
        whole = turn(moment, bases, back=True)
        for side, basis in bases.items():
            rank = self.seen(step) * moment.shape[2 - side]
            order = self._refresh(factors[side], basis, rank, step, names)
            second.copy_(reorder(second, order, side))
        moment.copy_(turn(whole, bases))

    def _advance_all(self, blocks: Blocks) -> None:
        for side, factor in blocks.factors.items():
            self.advance(factor, blocks.grad, side)

    def _direction(
        self,
        g: Tensor,
        m: Tensor,
        v: Tensor,
        bases: dict[int, Tensor],
        step: int,
        squares: Sequence[Tensor] = (),
    ) -> Tensor:
        """Adam's step in the eigenbasis (…, b, c), turned back; both moments advance in place.

        `squares` are the mean of v in each block (B,), where g is a strip of the blocks.
        """
        direction = g.clone()
        stacks = {side: [basis] for side, basis in bases.items()}
        lefts, rights = both(stacks)
        projection.project_adam([direction], [m], [v], lefts, rights, squares=squares, **self._adam(step))
        return direction

    def _adam(self, step: int) -> dict[str, Any]:
        """Coefficients of Adam's step; bias corrections are in the scale."""
        cfg = self.config
        n = max(step - 1 if self.authors else step, 1)
        scale = (1 - cfg.beta2**n) ** 0.5 / (1 - cfg.beta1**n)
        return {"beta1": cfg.beta1, "beta2": cfg.beta2, "eps": cfg.eps, "scale": scale, "floor": cfg.floor}

    # Slices along a side without a factor sum the factor of the other side, and the second moments of each block, which
    # a basis leaves as they are in sum; they get the basis from slice 0.

    def split_dim(self, info: MatrixInfo) -> int | None:
        """A side without a factor; of two, the longer."""
        sides = self.sides(info)
        if len(info.shape) == 1:
            return None if sides else 0
        return {0: int(info.shape[1] > info.shape[0]), 1: 1 - sum(sides)}.get(len(sides))

    def _stacks(self, info: MatrixInfo) -> list[tuple[int, int]]:
        """(count, size) of the blocks of the factor's side, by region; nothing where no side has one."""
        return [(count, block[side]) for side in self.sides(info) for count, *block in self.grid(info).shapes()]

    def legs(self, info: MatrixInfo, edges: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Leg]:
        """The factor's shares to slice 0, in fp64: the first basis is decomposed from their sum; bases back to all."""
        count, stacks = len(edges) - 1, self._stacks(info)
        given = sum(count * size * size for count, size in stacks) + self._blocks(info)
        up = Leg(True, to_first(given, count), 1, torch.float64)
        return [up, Leg(False, to_first(self._answer_size(info), count), 1, dtype)]

    def _blocks(self, info: MatrixInfo) -> int:
        return sum(count for count, *_ in self.grid(info).shapes())

    def _answer_size(self, info: MatrixInfo) -> int:
        """Elements that slice 0 sends back: how far the matrix is, mean squares, old and new bases, the order of columns."""
        return 1 + self._blocks(info) + sum(count * size * (2 * size + 1) for count, size in self._stacks(info))

    def slice_update(
        self, grad: Tensor, state: State, shared: State, step: int, info: MatrixInfo, index: int, edges: tuple[int, ...]
    ) -> SliceStep:
        factor = yield self._share(grad, state, info).view(-1, 1)
        mine = grad.new_empty(0) if index else self._combine(factor.flatten(), shared, step, info)
        combined = yield mine.view(-1, 1)
        return self._finish(grad, combined.flatten(), state, step, info)

    def slice_costs(self, info: MatrixInfo, edges: tuple[int, ...]) -> list[Cost]:
        """Refreshing bases, factors and bases themselves are slice 0's alone."""
        whole, alone, held = self.cost(info), {"gemm": 0.0, "qr": 0.0}, 4.0
        for count, size in self._stacks(info):
            alone["gemm"] += count * 2.0 * size**3
            alone["qr"] += count * 8.0 / 3.0 * size**3
            held += count * size * size * (12.0 if self.config.factor_precision == "fp64" else 8.0)
        spread = replace(
            whole,
            refresh={kind: value - alone[kind] for kind, value in whole.refresh.items()},
            state_bytes=whole.state_bytes - held,
        )
        costs = [spread.scaled(share) for share in shares(edges)]
        refresh = {kind: value + alone[kind] for kind, value in costs[0].refresh.items()}
        return [replace(costs[0], refresh=refresh, state_bytes=costs[0].state_bytes + held), *costs[1:]]

    def _share(self, grad: Tensor, state: State, info: MatrixInfo) -> Tensor:
        side, grad, second = self.sides(info), as_matrix(grad), as_matrix(state["exp_avg_sq"])
        grid, beta2 = self.grid(info, tuple(grad.shape)), self.config.beta2
        sums = [
            beta2 * v.double().sum((-2, -1)) + (1 - beta2) * g.double().square().sum((-2, -1))
            for g, v in zip(grid.cut(grad), grid.cut(second))
        ]
        if not side:
            return torch.cat(sums)
        if not state["exp_avg_sq"].any():  # the first factor is decomposed: its small eigenvalues count
            grad = grad.double()
        shares = [g @ g.mT if side[0] == 0 else g.mT @ g for g in grid.cut(grad)]
        return torch.cat([*sums, *(share.flatten() for share in shares)]).double()

    def _combine(self, factor: Tensor, shared: State, step: int, info: MatrixInfo) -> Tensor:
        cfg, ready = self.config, shared["ready"]
        first, due = not bool(ready.item()), self.is_due(info, step)
        seeded = first and self._is_seeded(shared, info)
        sizes = [rows * columns for count, rows, columns in self.grid(info).shapes() for _ in range(count)]
        squares, factor = factor[: len(sizes)], factor[len(sizes) :]
        pieces = [ready + 2.0 * seeded * bool(factor.any()), (squares / squares.new_tensor(sizes)).to(ready.dtype)]
        if seeded and not factor.any():
            return ready.new_zeros(self._answer_size(info))
        offset = 0
        for side in self.sides(info):
            others = info.shape[1 - side]
            for region, (count, size) in enumerate(self._stacks(info)):
                share = factor[offset : offset + count * size * size].view(count, size, size)
                offset += count * size * size
                gg, q = shared[f"gg_{region}_{side}"], shared[f"q_{region}_{side}"]
                pieces.append(q.flatten().clone())
                rank = min(size, self.seen(step) * others)
                order = torch.arange(size, device=q.device).repeat(count, 1)
                if seeded:
                    gg.mul_(cfg.shampoo_beta).add_(share.to(gg.dtype), alpha=1 - cfg.shampoo_beta)
                    self._keep(q, self._bases_of(gg, q.dtype), [info.name] * count)
                elif first:
                    found = guarded(
                        lambda a, r, dtype=q.dtype: eigenbasis.first_basis_of_factor(a, r, dtype),
                        (share,),
                        rank or size,
                    )
                    self._keep(q, found, [info.name] * count)
                elif due and not self.authors:
                    order = self._refresh(gg, q, rank, step, [info.name] * count)
                if not seeded:
                    gg.mul_(cfg.shampoo_beta).add_(share.to(gg.dtype), alpha=1 - cfg.shampoo_beta)
                if not first and due and self.authors:
                    order = self._refresh(gg, q, rank, step, [info.name] * count)
                pieces += [q.flatten(), order.flatten().to(q.dtype)]
        ready.fill_(float(not first or not factor.numel() or factor.any()))
        return torch.cat(pieces)

    def _finish(self, grad: Tensor, combined: Tensor, state: State, step: int, info: MatrixInfo) -> Tensor:
        if not combined[0]:
            return torch.zeros_like(grad)
        moments = [as_matrix(state[key]) for key in self.block_keys]
        grid, found = self.grid(info, tuple(moments[0].shape)), []
        means, rest = combined[1:].tensor_split([self._blocks(info)])
        seeded = bool(combined[0] > 1)
        stacks = [grid.cut(x) for x in (as_matrix(grad), *moments)]
        for region, (g, m, v) in enumerate(zip(*stacks)):
            mean, means = means.tensor_split([len(g)])
            old, new = {}, {}
            for side in self.sides(info):
                count, size = self._stacks(info)[region]
                square = count * size * size
                before, after, order, rest = rest.tensor_split([square, 2 * square, 2 * square + count * size])
                old[side], new[side] = (q.view(count, size, size).to(g.dtype) for q in (before, after))
            if seeded:
                turn_in(m, v, new)
                found.append(torch.zeros_like(g))
                continue
            found.append(self._direction(g, m, v, old, step, [mean]))
            if old and self.is_due(info, step):
                m.copy_(turn(turn(m, old, back=True), new))
                v.copy_(reorder(v, order.view(count, size).round().long(), side))
        for stack, moment in zip(stacks[1:], moments):
            grid.join(stack, moment)
        return grid.join(found, as_matrix(torch.empty_like(grad))).view(grad.shape)

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
                state += count * size * size * (12.0 if self.config.factor_precision == "fp64" else 8.0)
        kind = "gemm" if self.is_large(info) else "small_gemm"
        return Cost(
            flops={kind: gemm} if gemm else {},
            refresh=refresh if gemm else {},
            refresh_every=self.config.precondition_frequency,
            elementwise_bytes=4.0 * 16 * rows * columns,
            state_bytes=state + 8.0 * rows * columns,
        )
