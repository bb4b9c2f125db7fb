"""SOAP on shards of a side without a factor: they sum the factor of the other side, and get its bases from shard 0.

The second moments of each block, which a basis leaves as they are in sum, are summed too, for the floor.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_opt.kernels import eigenbasis
from megatron_opt.optimizers.base import Cost, State
from megatron_opt.optimizers.bases import follow, rotate_moments
from megatron_opt.optimizers.blocks import as_matrix
from megatron_opt.optimizers.decomposition import decompose_or_keep
from megatron_opt.optimizers.factored import FactoredPartition
from megatron_opt.optimizers.flag_coroutines import FlagCoroutine, together
from megatron_opt.optimizers.message import Message
from megatron_opt.optimizers.narrow import widened
from megatron_opt.optimizers.partition import Collective, ShardStep, all_gather, reduce_scatter, shares, to_first

if TYPE_CHECKING:
    from megatron_opt.optimizers.soap import Soap


class SoapPartition(FactoredPartition):
    """Two exchanges: every shard's share of factors to shard 0, bases back to all."""

    optimizer: "Soap"

    @property
    def side(self) -> int | None:
        """The one side with a factor, None where there is none."""
        return next(iter(self.optimizer.sides(self.info)), None)

    def _regions(self) -> list[tuple[int, int, int]]:
        """(count, rows, columns) of the blocks of each region."""
        return self.optimizer.grid(self.info).shapes()

    def _factors(self, region: tuple[int, int, int]) -> tuple[int, int, int]:
        """Shape of a region's stack of factors."""
        count, *block = region
        assert self.side is not None
        return count, block[self.side], block[self.side]

    def sums(self) -> Message:
        """To shard 0, in fp64: the first basis is decomposed from their sum."""
        fields: dict[str, Any] = {}
        for number, region in enumerate(self._regions()):
            fields[f"squares_{number}"] = (region[0],), torch.float64
            if self.side is not None:
                fields[f"factors_{number}"] = self._factors(region), torch.float64
        return Message(fields)

    def answer(self, dtype: torch.dtype) -> Message:
        """To all: flags, mean squares, and what bases become.

        `flags`, of use in the first step alone: whether the matrix has begun with it, and whether each region was seeded by
        a warm start. `old` are the bases in which this step is made, `new` those after it, `order` that of the old columns
        in them.
        """
        fields: dict[str, Any] = {"flags": ((1 + len(self._regions()),), torch.bool)}
        for number, region in enumerate(self._regions()):
            fields[f"mean_{number}"] = (region[0],), dtype
            if self.side is not None:
                shape = self._factors(region)
                fields |= {f"old_{number}": (shape, dtype), f"new_{number}": (shape, dtype)}
                fields[f"order_{number}"] = shape[:2], torch.int32
        return Message(fields)

    def init_shard(self, weight: Tensor) -> State:
        return self.optimizer.init_moments(weight) | self.optimizer.init_flag(weight.dtype)

    def init_shared(self, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        return self.optimizer.init_factors(self.info, device, dtype)

    def collectives(self, edges: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Collective]:
        count, sums, answer = len(edges) - 1, self.sums(), self.answer(dtype)
        up = reduce_scatter(to_first(len(sums), count), 1, sums.dtype)
        return [up, all_gather(to_first(len(answer), count), 1, answer.dtype)]

    def step(
        self, grad: Tensor, state: State, shared: State, step: int, index: int, edges: tuple[int, ...]
    ) -> ShardStep:
        with widened([state, shared], grad.dtype) as (wide, factors):
            return (yield from self._step(grad, wide, factors, step, index))

    def _step(self, grad: Tensor, state: State, shared: State, step: int, index: int) -> ShardStep:
        sums, answer, begun = self.sums(), self.answer(grad.dtype), bool(state["ready"].item())
        total = yield sums.pack(**self._shares(grad, state, first=not begun or step <= 2))
        mine = grad.new_empty(0, 1, dtype=answer.dtype)
        if index == 0:
            make = self._advance_shared if begun else self._begin_shared
            mine = answer.pack(**make(sums.unpack(total), shared, step, grad.dtype))
        totals = answer.unpack((yield mine))
        return self._advance_shard(grad, totals, state, step, begun)

    def _shares(self, grad: Tensor, state: State, first: bool) -> dict[str, Tensor]:
        """This shard's part of what is summed; `first`: moments may be zero."""
        fields, side, beta2 = {}, self.side, self.optimizer.config.beta2
        grad, second = as_matrix(grad), as_matrix(state["exp_avg_sq"])
        grid = self.optimizer.grid(self.info, tuple(grad.shape))
        # the first factor is decomposed: its small eigenvalues count
        exact = first and side is not None and not bool(second.any())
        for number, (g, v) in enumerate(zip(grid.cut(grad), grid.cut(second))):
            squares = g.double().square().sum((-2, -1))
            fields[f"squares_{number}"] = beta2 * v.double().sum((-2, -1)) + (1 - beta2) * squares
            if side is not None:
                g = g.double() if exact else g
                fields[f"factors_{number}"] = (g @ g.mT if side == 0 else g.mT @ g).double()
        return fields

    def _answered(self, sums: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The answer's flags, of a matrix that has begun, and mean squares."""
        regions = self._regions()
        fields = {"flags": sums["squares_0"].new_zeros(1 + len(regions), dtype=torch.bool)}
        fields["flags"][0].fill_(True)
        for number, (_, rows, columns) in enumerate(regions):
            squares = sums[f"squares_{number}"]
            fields[f"mean_{number}"] = (squares / squares.new_full((), rows * columns)).to(dtype)
        return fields

    def _advance_shared(
        self, sums: dict[str, Tensor], shared: State, step: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Factors and bases of shard 0; the answer to all."""
        soap, side, fields = self.optimizer, self.side, self._answered(sums, dtype)
        if side is None:
            return fields
        due, regions = soap.is_due(self.info, step), self._regions()
        factors = [soap.factors_of(shared, [side], number) for number in range(len(regions))]
        orders = [torch.arange(q[side].shape[-1], device=q[side].device).repeat(len(q[side]), 1) for _, q in factors]
        if soap.authors:
            self._advance_all(factors, sums)
        for number, (_, q) in enumerate(factors):
            fields[f"old_{number}"] = q[side].clone()
        if due:
            runs = [
                soap.new_bases(gg, q, (rows, columns), step, [self.info.name] * count)
                for (gg, q), (count, rows, columns) in zip(factors, regions)
            ]
            for number, (new, order) in enumerate(together(runs)):
                factors[number][1][side].copy_(new[side])
                orders[number] = order[side]
        if not soap.authors:
            self._advance_all(factors, sums)
        for number, (_, q) in enumerate(factors):
            fields |= {f"new_{number}": q[side], f"order_{number}": orders[number].int()}
        return fields

    def _begin_shared(self, sums: dict[str, Tensor], shared: State, step: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The first factors and bases of shard 0; the answer to all."""
        soap, side, regions = self.optimizer, self.side, self._regions()
        fields = self._answered(sums, dtype)
        if side is None:
            return fields
        factors = [soap.factors_of(shared, [side], number) for number in range(len(regions))]
        shares = [sums[f"factors_{number}"] for number in range(len(regions))]
        flags = [*(share.any() for share in shares), *soap.seeds(shared, self.info)]
        known = torch.stack(flags).tolist()
        moved, seeded = any(known[: len(regions)]), soap.seeded(known[len(regions) :], self.info)
        if not moved and any(seeded):
            shapes = self.answer(dtype).fields
            return {name: shares[0].new_zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        for number, (_, q) in enumerate(factors):
            order = torch.arange(q[side].shape[-1], device=q[side].device).repeat(len(q[side]), 1)
            fields |= {f"old_{number}": q[side].clone(), f"order_{number}": order.int()}
        together(
            [
                self._begin(gg, q, warm, share, step, (rows, columns), [self.info.name] * count)
                for (gg, q), warm, share, (count, rows, columns) in zip(factors, seeded, shares, regions)
            ]
        )
        for number, (_, q) in enumerate(factors):
            fields[f"new_{number}"] = q[side]
        for at, flag in enumerate((moved, *seeded)):
            fields["flags"][at].fill_(flag)
        return fields

    def _begin(
        self,
        factors: dict[int, Tensor],
        bases: dict[int, Tensor],
        seeded: bool,
        share: Tensor,
        step: int,
        shape: tuple[int, int],
        names: list[str],
    ) -> FlagCoroutine[None]:
        ((side, basis),) = bases.items()
        size = basis.shape[-1]
        rank = min(size, self.optimizer.seen(step) * shape[1 - side]) or size

        def first() -> FlagCoroutine[dict[int, Tensor]]:
            compute = eigenbasis.first_basis_of_factor
            decomposition = yield from decompose_or_keep(compute, (share,), rank, basis.dtype, keep=(basis,))
            return {side: self.optimizer.kept(decomposition, names)[0]}

        def advance(factor: Tensor, side: int) -> None:
            self._advance(factor, share)

        return self.optimizer.begin_bases(factors, bases, seeded, first, advance, names)

    def _advance_all(
        self, of_regions: list[tuple[dict[int, Tensor], dict[int, Tensor]]], sums: dict[str, Tensor]
    ) -> None:
        """This step's shares into all factors."""
        for number, (factors, _) in enumerate(of_regions):
            for factor in factors.values():
                self._advance(factor, sums[f"factors_{number}"])

    def _advance(self, factor: Tensor, share: Tensor) -> None:
        """GG ← β·GG + (1−β)·share, in place."""
        beta = self.optimizer.config.shampoo_beta
        factor.mul_(beta).add_(share.to(factor.dtype), alpha=1 - beta)

    def _advance_shard(self, grad: Tensor, answer: dict[str, Tensor], state: State, step: int, begun: bool) -> Tensor:
        """The shard's direction."""
        soap, side = self.optimizer, self.side
        if not begun:
            ready, *seeded = answer["flags"].tolist()
            state["ready"].fill_(float(ready))
        moments = [as_matrix(state[key]) for key in soap.block_keys]
        grid, directions = soap.grid(self.info, tuple(moments[0].shape)), []
        stacks = [grid.cut(x) for x in (as_matrix(grad), *moments)]
        for number, (g, m, v) in enumerate(zip(*stacks)):
            old, new, order = (
                {} if side is None else {side: answer[f"{what}_{number}"]} for what in ("old", "new", "order")
            )
            directions.append(g.clone() if begun else torch.zeros_like(g))
            if begun:
                bases = {side: [basis] for side, basis in old.items()}
                soap.direction([directions[-1]], [[m], [v]], bases, step, squares=[answer[f"mean_{number}"]])
                if old and soap.is_due(self.info, step):
                    follow(m, v, old, new, {side: columns.long() for side, columns in order.items()})
            elif seeded[number]:
                rotate_moments(m, v, new)
        for stack, moment in zip(stacks[1:], moments):
            grid.join(stack, moment)
        return grid.join(directions, as_matrix(torch.empty_like(grad))).view(grad.shape)

    def shard_costs(self, edges: tuple[int, ...]) -> list[Cost]:
        """Refreshing bases, factors and bases themselves are shard 0's alone."""
        whole, alone, state_bytes = self.optimizer.cost(self.info), {"gemm": 0.0, "qr": 0.0}, 0.0
        flag = 4.0  # bytes, with every shard
        for region in self._regions() if self.side is not None else ():
            count, size, _ = self._factors(region)
            alone["gemm"] += count * 2.0 * size**3
            alone["qr"] += count * 8.0 / 3.0 * size**3
            state_bytes += count * size * size * self.optimizer.factor_bytes
        spread = replace(
            whole,
            refresh={kind: value - alone[kind] for kind, value in whole.refresh.items()},
            state_bytes=whole.state_bytes - state_bytes - flag,
        )
        costs = [spread.scaled(share) for share in shares(edges)]
        costs = [replace(cost, state_bytes=cost.state_bytes + flag) for cost in costs]
        refresh = {kind: value + alone[kind] for kind, value in costs[0].refresh.items()}
        return [replace(costs[0], refresh=refresh, state_bytes=costs[0].state_bytes + state_bytes), *costs[1:]]
