"""SOAP: Adam in the eigenbasis of Shampoo's factors. arXiv 2409.11321; as run in arXiv 2509.02046 (`study`).

The study's form: step 1 only starts factors and bases and moves nothing; bias corrections count every step; a refresh is
due when t % frequency = 0 and uses the factors from before this step. The authors' form (`variant=authors`) does not
count step 1, refreshes when (t − 1) % frequency = 0, and uses the new factors. Where a factor is rank-deficient the
null space of its basis is filled by `eigenbasis.complete`, a function of the gradients alone.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import eigenbasis
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer, Shape, State
from megatron_opt.optimizers.blocks import Grid, as_matrix, batched
from megatron_opt.optimizers.options import check, choice, option
from megatron_opt.optimizers.registry import register

log = logging.getLogger(__name__)
_SMALL = 128  # blocks up to this side go through one batched product over all matrices


@dataclass(frozen=True)
class SoapConfig:
    """Hyperparameters of SOAP; tuned values of the study."""

    beta1: float = option(0.95, "decay of the first moment", low=0, below=1)
    beta2: float = option(0.99, "decay of the second moment in the eigenbasis", low=0, below=1)
    shampoo_beta: float = option(0.95, "decay of the factors G·Gᵀ and GᵀG", low=0, below=1)
    eps: float = option(1e-10, "added to the square root of the second moment", above=0)
    precondition_frequency: int = option(10, "steps between refreshes of the eigenbases", low=1)
    block_size: int = option(512, "matrices are cut into blocks of this side; 0: whole", low=0)
    max_precond_dim: int = option(10000, "a side this long or longer is not preconditioned, nor cut", low=1)
    one_sided: bool = option(False, "precondition only the shorter side of a matrix")
    precondition_1d: bool = option(True, "precondition vectors too")
    variant: str = choice("study", ("study", "authors"), "which form of counting and refreshing")
    stagger: bool = option(False, "spread refreshes over steps by a hash of the matrix's name")
    adaptive_tol: float = option(
        0.0, "skip a due refresh while a probe of the basis turns less than this", low=0
    )
    factor_precision: str = choice(
        "fp32", ("fp32", "fp64"), "dtype of the factors; fp64 makes small eigenvectors exact"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass
class _Item:
    """One region of one matrix: its stacks of blocks and where its factors are."""

    matrix: int
    region: int
    grad: Tensor  # (B, b, c)
    moment: Tensor
    second: Tensor


@register
class Soap(MatrixOptimizer):
    """v ← EMA((Q_Lᵀ g Q_R)²);  m ← EMA(g);  direction = Q_L [Q_Lᵀ m Q_R /(√v + ε)] Q_Rᵀ·√(1−β2ⁿ)/(1−β1ⁿ)."""

    name: ClassVar[str] = "soap"
    Config: ClassVar[type] = SoapConfig
    clip: ClassVar[bool] = True
    vectors: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.failures: Counter[str] = (
            Counter()
        )  # decompositions that failed twice, by matrix; the old basis was kept

    # Which sides, which blocks

    def sides(self, info: MatrixInfo) -> tuple[int, ...]:
        """Sides with a factor."""
        limit = self.config.max_precond_dim
        if len(info.shape) == 1:
            return (0,) if self.config.precondition_1d and info.shape[0] < limit else ()
        sides = tuple(side for side in (0, 1) if info.shape[side] < limit)
        if self.config.one_sided and len(sides) == 2:
            return (0,) if info.shape[0] <= info.shape[1] else (1,)
        return sides

    def grid(self, info: MatrixInfo, shape: Shape | None = None) -> Grid:
        """Blocks of the matrix, or of a slice of the given shape; a side without a factor is not cut."""
        rows, columns = shape or (*info.shape, 1)[:2]
        sides, size = self.sides(info), self.config.block_size
        return Grid.of(
            (rows, columns),
            (size if size and 0 in sides else rows, size if size and 1 in sides else columns),
        )

    def is_due(self, info: MatrixInfo, step: int) -> bool:
        """Whether the bases of this matrix are refreshed at this step: a function of name and step alone."""
        count = step - 1 if self.config.variant == "authors" else step
        offset = zlib.crc32(info.name.encode()) if self.config.stagger else 0
        return (count + offset) % self.config.precondition_frequency == 0

    # State

    def init_slice(self, weight: Tensor, info: MatrixInfo) -> State:
        return {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    def init_shared(
        self, info: MatrixInfo, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> State:
        state = {"ready": torch.zeros(1, dtype=dtype, device=device)}
        wide = torch.float64 if self.config.factor_precision == "fp64" else dtype
        for region, (count, *block) in enumerate(self.grid(info).shapes()):
            for side in self.sides(info):
                shape = (count, block[side], block[side])
                state[f"gg.{region}.{side}"] = torch.zeros(shape, dtype=wide, device=device)
                state[f"q.{region}.{side}"] = torch.zeros(shape, dtype=dtype, device=device)
        return state

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        return self.init_slice(weight, info) | self.init_shared(info, weight.device, weight.dtype)

    # One step on whole matrices

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        ready = torch.cat([state["ready"] for state in states]).tolist()
        directions = [torch.zeros_like(grad) for grad in grads]
        groups: dict[tuple, list[_Item]] = {}
        cuts: dict[int, list[Tensor]] = {}
        for index, (grad, state, info) in enumerate(zip(grads, states, infos)):
            if not ready[index]:
                self._first(as_matrix(grad), state, info)
                continue
            state["exp_avg"].lerp_(grad, 1 - self.config.beta1)
            grid, sides, due = self.grid(info), self.sides(info), self.is_due(info, step)
            parts = [as_matrix(x) for x in (grad, state["exp_avg"], state["exp_avg_sq"])]
            stacks = [grid.cut(part) for part in parts]
            cuts[index] = stacks[2]
            for region, (g, m, v) in enumerate(zip(*stacks)):
                key = (*g.shape[1:], sides, due, g.dtype, g.device)
                group = groups.setdefault(key if max(g.shape[1:]) <= _SMALL else (*key, index, region), [])
                group.append(_Item(index, region, g, m, v))
        blocks: dict[int, dict[int, Tensor]] = {index: {} for index in cuts}
        for (_, _, sides, due, *_), items in groups.items():
            found = self._region_step(items, states, infos, sides, step, due)
            for item, stack in zip(items, found):
                blocks[item.matrix][item.region] = stack
        for index, seconds in cuts.items():
            grid = self.grid(infos[index])
            grid.join([blocks[index][region] for region in range(len(seconds))], as_matrix(directions[index]))
            if sum(map(len, seconds)) > 1:
                grid.join(seconds, as_matrix(states[index]["exp_avg_sq"]))
        return directions

    def _first(self, grad: Tensor, state: State, info: MatrixInfo) -> None:
        """Factors of the first gradient and their bases."""
        sides = self.sides(info)
        for region, stack in enumerate(self.grid(info).cut(grad)):
            for side in sides:
                self._advance(state[f"gg.{region}.{side}"], stack, side)
            for side in sides:
                bases = eigenbasis.guarded(lambda g, s: eigenbasis.first_bases(g, (s,))[s], (stack,), side)
                self._keep(state[f"q.{region}.{side}"], bases, info.name)
        state["ready"].fill_(1.0)

    def _keep(self, basis: Tensor, found: Sequence[Any], name: str) -> Tensor:
        """New bases into `basis` (B, K, K) where they were found; the order of columns (B, K)."""
        size = basis.shape[-1]
        order = torch.arange(size, device=basis.device).repeat(len(basis), 1)
        for block, result in enumerate(found):
            if result is None:
                self.failures[name] += 1
                log.warning("%s: eigenbasis failed %d times; the old one is kept", name, self.failures[name])
                if not basis[block].any():
                    basis[block] = torch.eye(size, dtype=basis.dtype, device=basis.device)
            elif isinstance(result, tuple):
                basis[block], order[block] = result
            else:
                basis[block] = result
        return order

    def _advance(self, factor: Tensor, grad: Tensor, side: int) -> None:
        """GG ← β·GG + (1−β)·g gᵀ (side 0) or gᵀg (side 1), in place."""
        beta, g = self.config.shampoo_beta, grad.to(factor.dtype)
        left, right = (g, g.mT) if side == 0 else (g.mT, g)
        factor.baddbmm_(left, right, beta=beta, alpha=1 - beta)

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
        found = eigenbasis.guarded(eigenbasis.power_step, picked, min(rank, size))
        for block, result in zip(chosen.tolist(), found):
            order[block] = self._keep(basis[block : block + 1], [result], names[block])[0]
        return order

    def _region_step(
        self,
        items: Sequence[_Item],
        states: Sequence[State],
        infos: Sequence[MatrixInfo],
        sides: tuple[int, ...],
        step: int,
        due: bool,
    ) -> list[Tensor]:
        """Directions of equal blocks of many matrices; states change in place."""
        counts = [len(item.grad) for item in items]
        g, m, v = (batched([getattr(item, key) for item in items]) for key in ("grad", "moment", "second"))
        held = {
            key: [states[item.matrix][f"{key[0]}.{item.region}.{key[1]}"] for item in items]
            for key in ((kind, side) for kind in ("gg", "q") for side in sides)
        }
        tensors = {key: batched(parts) for key, parts in held.items()}
        bases = {side: tensors["q", side] for side in sides}
        u = self._direction(g, m, v, bases, step)
        authors = self.config.variant == "authors"
        if authors:
            for side in sides:
                self._advance(tensors["gg", side], g, side)
        if due:
            names = [infos[item.matrix].name for item in items for _ in range(len(item.grad))]
            for side in sides:
                rank = (step if authors else step - 1) * g.shape[2 - side]
                order = self._refresh(tensors["gg", side], bases[side], rank, step, names)
                v = _reorder(v, order, side)
        if not authors:
            for side in sides:
                self._advance(tensors["gg", side], g, side)
        if len(items) > 1:
            for key, parts in held.items():
                for part, new in zip(parts, tensors[key].split(counts)):
                    part.copy_(new)
        for item, new in zip(items, v.split(counts)):
            if item.second.data_ptr() != new.data_ptr():
                item.second.copy_(new)
        return list(u.split(counts))

    def _direction(self, g: Tensor, m: Tensor, v: Tensor, bases: dict[int, Tensor], step: int) -> Tensor:
        """Adam's step in the eigenbasis (…, b, c); the second moment `v` advances in place."""
        cfg = self.config
        rotated = _rotate(g, bases)
        v.mul_(cfg.beta2).addcmul_(rotated, rotated, value=1 - cfg.beta2)
        n = step - 1 if cfg.variant == "authors" else step
        n = max(n, 1)
        scale = (1 - cfg.beta2**n) ** 0.5 / (1 - cfg.beta1**n)
        return _rotate(_rotate(m, bases) / (v.sqrt() + cfg.eps), bases, back=True) * scale

    # Slices along a side without a factor: the factor of the other side is summed, its basis sent to the slices

    def split_dim(self, info: MatrixInfo) -> int | None:
        """A side without a factor; None where both have one (or a vector has one)."""
        sides = self.sides(info)
        if len(info.shape) == 1:
            return None if sides else 0
        if len(sides) == 2:
            return None
        return 1 - sides[0] if sides else int(info.shape[1] > info.shape[0])

    def factor_dtype(self) -> torch.dtype:
        """fp64: the first basis is decomposed from it; later shares are fp32 products."""
        return torch.float64

    def _stacks(self, info: MatrixInfo) -> list[tuple[int, int]]:
        """(count, size) of the blocks of the factor's side, by region; nothing where no side has one."""
        return [
            (count, block[side]) for side in self.sides(info) for count, *block in self.grid(info).shapes()
        ]

    def partial_shape(self, info: MatrixInfo) -> Shape:
        return (sum(count * size * size for count, size in self._stacks(info)),)

    def combined_shape(self, info: MatrixInfo) -> Shape:
        return (1 + sum(count * size * (size + 1) for count, size in self._stacks(info)),)

    def partial(self, grad: Tensor, state: State, step: int, info: MatrixInfo) -> Tensor:
        side = self.sides(info)
        if not side:
            return grad.new_empty(0, dtype=torch.float64)
        grad = as_matrix(grad)
        if not state["exp_avg"].any():  # the first factor is decomposed: its small eigenvalues count
            grad = grad.double()
        shares = [
            g @ g.mT if side[0] == 0 else g.mT @ g for g in self.grid(info, tuple(grad.shape)).cut(grad)
        ]
        return torch.cat([share.flatten() for share in shares]).double()

    def combine(self, factor: Tensor, shared: State, step: int, info: MatrixInfo) -> Tensor:
        cfg, ready = self.config, shared["ready"]
        pieces = [ready.clone()]
        first, due = not bool(ready.item()), self.is_due(info, step)
        offset = 0
        for side in self.sides(info):
            others = info.shape[1 - side]
            for region, (count, size) in enumerate(self._stacks(info)):
                share = factor[offset : offset + count * size * size].view(count, size, size)
                offset += count * size * size
                gg, q = shared[f"gg.{region}.{side}"], shared[f"q.{region}.{side}"]
                pieces.append(q.flatten().clone())
                rank = min(size, (step if cfg.variant == "authors" else step - 1) * others)
                order = torch.arange(size, device=q.device).repeat(count, 1)
                if first:
                    found = eigenbasis.guarded(
                        lambda a, r, dtype=q.dtype: eigenbasis.first_basis_of_factor(a, r, dtype),
                        (share,),
                        rank or size,
                    )
                    self._keep(q, found, info.name)
                elif due and cfg.variant == "study":
                    order = self._refresh(gg, q, rank, step, [info.name] * count)
                gg.mul_(cfg.shampoo_beta).add_(share.to(gg.dtype), alpha=1 - cfg.shampoo_beta)
                if not first and due and cfg.variant == "authors":
                    order = self._refresh(gg, q, rank, step, [info.name] * count)
                pieces.append(order.flatten().to(q.dtype))
        ready.fill_(1.0)
        return torch.cat(pieces)

    def finish(self, grad: Tensor, combined: Tensor, state: State, step: int, info: MatrixInfo) -> Tensor:
        if not combined[0]:
            return torch.zeros_like(grad)
        state["exp_avg"].lerp_(grad, 1 - self.config.beta1)
        matrix = as_matrix(grad)
        grid = self.grid(info, tuple(matrix.shape))
        parts = [grid.cut(as_matrix(x)) for x in (matrix, state["exp_avg"], state["exp_avg_sq"])]
        rest, found, seconds = combined[1:], [], []
        for (g, m, v), (count, size) in zip(zip(*parts), self._stacks(info) or [(0, 0)]):
            bases, order = {}, None
            for side in self.sides(info):
                basis, order, rest = rest.tensor_split([count * size**2, count * (size**2 + size)])
                bases[side] = basis.view(count, size, size).to(g.dtype)
                order = order.view(count, size).round().long()
            found.append(self._direction(g, m, v, bases, step))
            seconds.append(_reorder(v, order, self.sides(info)[0]) if order is not None else v)
        grid.join(seconds, as_matrix(state["exp_avg_sq"]))
        return grid.join(found, as_matrix(torch.empty_like(grad))).view(grad.shape)

    def cost(self, info: MatrixInfo) -> Cost:
        sides = self.sides(info)
        gemm, refresh, state = 0.0, {"gemm": 0.0, "qr": 0.0}, 4.0
        rows, columns = (*info.shape, 1)[:2]
        for count, *block in self.grid(info).shapes():
            for side in sides:
                size, other = block[side], block[1 - side]
                gemm += count * 8.0 * size * size * other  # factor 2, rotations of g and m in and of u out 6
                refresh["gemm"] += count * 2.0 * size**3
                refresh["qr"] += count * 8.0 / 3.0 * size**3  # geqrf 4/3 and householder_product 4/3
                state += count * size * size * (12.0 if self.config.factor_precision == "fp64" else 8.0)
        kind = "gemm" if max(map(max, (s[1:] for s in self.grid(info).shapes()))) > _SMALL else "small_gemm"
        return Cost(
            flops={kind: gemm} if gemm else {},
            refresh=refresh if gemm else {},
            refresh_every=self.config.precondition_frequency,
            elementwise_bytes=4.0 * 16 * rows * columns,
            state_bytes=state + 8.0 * rows * columns,
        )


def _rotate(x: Tensor, bases: dict[int, Tensor], back: bool = False) -> Tensor:
    """Q_Lᵀ x Q_R, or Q_L x Q_Rᵀ; sides without a basis stay."""
    if 0 in bases:
        x = (bases[0] if back else bases[0].mT) @ x
    if 1 in bases:
        x = x @ (bases[1].mT if back else bases[1])
    return x


def _reorder(v: Tensor, order: Tensor, side: int) -> Tensor:
    """The second moment (B, b, c) follows the basis's columns (B, K)."""
    index = order.unsqueeze(-1) if side == 0 else order.unsqueeze(-2)
    return v.gather(side + 1, index.expand_as(v))
