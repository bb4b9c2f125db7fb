"""PSGD with Kronecker factors. arXiv 1512.04202, 2402.11858; as run in arXiv 2509.02046.

The update schedule is a function of the step alone and the noise of (matrix, step), so that all ranks agree.
"Per tensor" (normalization, damping, clip) is per logical matrix.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.kernels import preconditioner
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer, State
from megatron_opt.optimizers.blocks import Grid, as_matrix, batched
from megatron_opt.optimizers.options import check, choice, option
from megatron_opt.optimizers.registry import register

_SMALL = 128  # blocks up to this side go through one batched product over all matrices
_DAMPING = torch.finfo(torch.float32).eps ** 0.5


@dataclass(frozen=True)
class KronConfig:
    """Hyperparameters of Kron; tuned values of the study."""

    beta1: float = option(0.95, "decay of the first moment, which is bias-corrected", low=0, below=1)
    normalize_grads: bool = option(True, "divide each matrix's gradient by its norm")
    preconditioner_lr: float = option(0.2, "learning rate of the factors", above=0)
    preconditioner_init_scale: float = option(1.0, "factors start as this multiple of the identity", above=0)
    update_probability: float = option(0.1, "final share of steps that update the factors", above=0)
    update_flat_start: int = option(2000, "steps that all update, before the share decays", low=0)
    block_size: int = option(256, "matrices are cut into blocks of this side; 0: whole", low=0)
    max_size_triangular: int = option(25000, "a longer side has a diagonal factor, and is not cut", low=1)
    precondition_vocabulary: bool = option(
        False, "a triangular factor for the vocabulary's side of embedding and output too, which is diagonal"
    )
    max_update_rms: float = option(1.1, "matrices' directions are scaled down to this RMS; 0: not", low=0)
    balance_every: int = option(100, "updates of the factors between balancing them; 0: never", low=0)
    update_form: str = choice("triangular", ("triangular", "procrustes"), "how factors are updated")

    def __post_init__(self) -> None:
        check(self)


class UpdateSchedule:
    """Which steps update the factors: a counter reaches 1/probability(n), probability exp(−0.001·(n − flat start)).

    A function of the step alone; n counts from 1; the probability stays within [final, 1].
    """

    def __init__(self, final: float, flat_start: int) -> None:
        self.final, self.flat_start = min(final, 1.0), flat_start
        self.waited, self.done = 0, 0
        self.table = [0]  # by step: which update it is, 0 where it is none

    def __call__(self, step: int) -> int:
        """The number of this step's update, 0 where the step has none."""
        while len(self.table) <= step:
            share = max(self.final, min(1.0, exp(-0.001 * (len(self.table) - self.flat_start))))
            self.waited += 1
            due = self.waited >= 1 / share
            if due:
                self.waited, self.done = 0, self.done + 1
            self.table.append(self.done if due else 0)
        return self.table[step]


@dataclass
class _Item:
    """One region of one matrix: blocks of momentum, noise and damping's scale."""

    matrix: int
    region: int
    moment: Tensor  # (B, b, c)
    damped: Tensor | None
    noise: Tensor | None


@register
class Kron(MatrixOptimizer):
    """m ← EMA(g/‖g‖), bias-corrected;  Q₀, Q₁ learnt so that QᵀQ whitens m;  direction = Q₀ᵀQ₀·m·Q₁ᵀQ₁, RMS ≤ 1.1."""

    name: ClassVar[str] = "kron"
    Config: ClassVar[type] = KronConfig
    vectors: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.clip = not config.normalize_grads  # type: ignore[misc]  # a norm of one needs no clip
        self.schedule = UpdateSchedule(config.update_probability, config.update_flat_start)

    def diagonal(self, info: MatrixInfo) -> tuple[bool, ...]:
        """By side: whether its factor is diagonal (vectors, sides of one, the vocabulary, very long sides)."""
        if len(info.shape) == 1:
            return (True,)
        long = [side == 1 or side > self.config.max_size_triangular for side in info.shape]
        long[0] |= info.rows_are_tokens and not self.config.precondition_vocabulary
        return tuple(long)

    def grid(self, info: MatrixInfo) -> Grid:
        """Blocks; a side with a diagonal factor is not cut."""
        shape, size = (*info.shape, 1)[:2], self.config.block_size
        diagonal = (*self.diagonal(info), True)[:2]
        return Grid.of(shape, tuple(size if size and not flat else side for side, flat in zip(shape, diagonal)))

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        state = {"exp_avg": torch.zeros_like(weight)}
        scale = self.config.preconditioner_init_scale ** (1 / len(info.shape))
        for region, (count, *block) in enumerate(self.grid(info).shapes()):
            for side, flat in enumerate(self.diagonal(info)):
                eye = weight.new_ones(block[side]) if flat else torch.eye(block[side]).to(weight)
                state[f"q_{region}_{side}"] = (scale * eye).expand(count, *eye.shape).contiguous()
                if self.config.update_form == "procrustes":
                    state[f"bound_{region}_{side}"] = weight.new_ones(count)
        return state

    def noise(self, info: MatrixInfo, step: int, like: Tensor) -> Tensor:
        """Gaussian (m, n), a function of the matrix's name and the step."""
        generator = torch.Generator(like.device).manual_seed(zlib.crc32(info.name.encode()) * 2**20 + step)
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=like.device).to(like.dtype)

    def _moment(self, grad: Tensor, state: State, step: int) -> Tensor:
        """The bias-corrected momentum (m, n), advanced by this gradient."""
        cfg = self.config
        if cfg.normalize_grads:
            grad = grad / (torch.linalg.vector_norm(grad) + 1e-16)
        state["exp_avg"].lerp_(grad, 1 - cfg.beta1)
        return as_matrix(state["exp_avg"]) / (1 - cfg.beta1**step)

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        cfg, number = self.config, self.schedule(step)
        directions = [torch.empty_like(grad) for grad in grads]
        groups: dict[tuple, list[_Item]] = {}
        found: list[dict[int, Tensor]] = [{} for _ in grads]
        moments = [self._moment(grad, state, step) for grad, state in zip(grads, states)]
        means = torch.stack([m.abs().mean() for m in moments]).tolist() if number else [0.0] * len(moments)
        for index, (moment, mean, info) in enumerate(zip(moments, means, infos)):
            grid, flat = self.grid(info), self.diagonal(info)
            stacks = grid.cut(moment)
            extra: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(stacks)
            if mean > 0:  # factors learn nothing from zeros
                noise = self.noise(info, step, moment)
                extra = list(zip(grid.cut(torch.add(moment, noise, alpha=_DAMPING * mean)), grid.cut(noise)))
            for region, (m, (damped, drawn)) in enumerate(zip(stacks, extra)):
                key = (*m.shape[1:], flat, damped is not None, m.dtype, m.device)
                key = key if max(m.shape[1:]) <= _SMALL else (*key, index, region)
                groups.setdefault(key, []).append(_Item(index, region, m, damped, drawn))
        for items in groups.values():
            for item, stack in zip(items, self._region_step(items, states, infos, number)):
                found[item.matrix][item.region] = stack
        for index, (direction, info) in enumerate(zip(directions, infos)):
            blocks = found[index]
            self.grid(info).join([blocks[region] for region in range(len(blocks))], as_matrix(direction))
            if cfg.max_update_rms:
                rms = torch.linalg.vector_norm(direction) / direction.numel() ** 0.5
                direction.div_((rms / cfg.max_update_rms).clamp_min(1.0))
        return directions

    def _region_step(
        self, items: Sequence[_Item], states: Sequence[State], infos: Sequence[MatrixInfo], number: int
    ) -> list[Tensor]:
        """Preconditioned momentum of equal blocks of many matrices; factors change in place."""
        sides = range(len(self.diagonal(infos[items[0].matrix])))
        counts = [len(item.moment) for item in items]
        kinds = ("q", "bound") if self.config.update_form == "procrustes" else ("q",)
        held = {
            (kind, side): [states[item.matrix][f"{kind}_{item.region}_{side}"] for item in items]
            for kind in kinds
            for side in sides
        }
        tensors = {key: batched(parts) for key, parts in held.items()}
        factors = {side: tensors["q", side] for side in sides}
        damped = [item.damped for item in items if item.damped is not None]
        if damped:
            every = self.config.balance_every
            if every and number % every == 0:
                preconditioner.balance(factors)
            lr = self.config.preconditioner_lr
            if self.config.update_form == "triangular":
                noise = batched([item.noise for item in items if item.noise is not None])
                preconditioner.triangular_update(factors, batched(damped), noise, lr)
            else:
                bounds = {side: tensors["bound", side] for side in sides}
                preconditioner.procrustes_update(factors, bounds, batched(damped), lr)
            if len(items) > 1:
                for key, parts in held.items():
                    for part, new in zip(parts, tensors[key].split(counts)):
                        part.copy_(new)
        moment = batched([item.moment for item in items])
        triangular = self.config.update_form == "triangular"
        return list(preconditioner.precondition(moment, factors, triangular).split(counts))

    def cost(self, info: MatrixInfo) -> Cost:
        apply, refresh, state = 0.0, {"gemm": 0.0, "solve": 0.0}, 0.0
        rows, columns = (*info.shape, 1)[:2]
        procrustes = self.config.update_form == "procrustes"
        for count, *block in self.grid(info).shapes():
            for side, flat in enumerate(self.diagonal(info)):
                size, other = block[side], block[1 - side]
                state += 4.0 * count * (size if flat else size * size) + 4.0 * count * procrustes
                if flat:
                    continue
                apply += 4.0 * count * size * size * other
                if procrustes:  # P·g, its moment; moment·Q, R·Q, R·R·Q; two bounds
                    refresh["gemm"] += count * (6.0 * size * size * other + 6.0 * size**3 + 8.0 * size**2)
                else:  # Q·g, two moments; step·Q; one bound; one solve
                    refresh["gemm"] += count * (6.0 * size * size * other + 2.0 * size**3 + 4.0 * size**2)
                    refresh["solve"] += count * float(size * size * other)
        large = max(max(shape[1:]) for shape in self.grid(info).shapes()) > _SMALL
        return Cost(
            flops={"gemm" if large else "small_gemm": apply} if apply else {},
            refresh={key: value for key, value in refresh.items() if value},
            refresh_every=1 / min(self.config.update_probability, 1.0),
            elementwise_bytes=4.0 * 14 * rows * columns,
            state_bytes=state + 4.0 * rows * columns,
        )
