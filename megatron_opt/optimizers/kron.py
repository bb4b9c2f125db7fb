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

from megatron_opt.kernels import preconditioner, products, projection
from megatron_opt.optimizers.base import Cost, MatrixInfo, State, StateKind, StateSpec
from megatron_opt.optimizers.block_batches import SMALL, Planner
from megatron_opt.optimizers.blocks import Grid, apart, as_matrix, batched
from megatron_opt.optimizers.narrow import NarrowOptimizer, moment_option
from megatron_opt.optimizers.options import OptionError, check, choice, decay, option
from megatron_opt.optimizers.registry import register

_CHUNK = 16  # small matrices whose noise stays in cache until it is used
_DAMPING = torch.finfo(torch.float32).eps ** 0.5


@dataclass(frozen=True)
class KronConfig:
    """Hyperparameters of Kron; tuned values of the study."""

    beta1: float = decay(0.95, "decay of the first moment, which is bias-corrected")
    normalize_grads: bool = option(True, "divide each matrix's gradient by its norm")
    preconditioner_lr: float = option(0.2, "learning rate of the factors", above=0, high=0.5)
    preconditioner_init_scale: float = option(1.0, "factors start as this multiple of the identity", low=1e-6, high=1e6)
    update_probability: float = option(0.1, "final share of steps that update the factors", low=1e-9, high=1)
    update_flat_start: int = option(2000, "steps that all update, before the share decays", low=0, high=10**12)
    block_size: int = option(256, "matrices are cut into blocks of this side; 0: whole", low=0, high=10**9)
    max_size_triangular: int = option(25000, "a longer side has a diagonal factor, and is not cut", low=1, high=10**12)
    precondition_vocabulary: bool = option(
        False, "a triangular factor for the vocabulary's side of embedding and output too, which is diagonal"
    )
    max_update_rms: float = option(1.1, "matrices' directions are scaled down to this RMS; 0: not", low=0, high=1e9)
    balance_every: int = option(100, "updates of the factors between balancing them; 0: never", low=0, high=10**12)
    update_form: str = choice("triangular", ("triangular", "procrustes"), "how factors are updated")
    factor_precision: str = choice("fp32", ("bf16", "fp32"), "dtype of the factors")
    moment_dtype: str = moment_option()

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.max_update_rms < 1e-6:
            raise OptionError("max_update_rms", f"is {self.max_update_rms}; it must be 0, or at least 1e-06.")


class UpdateSchedule:
    """Which steps update the factors: a counter reaches 1/probability(n), probability exp(−0.001·(n − flat start)).

    A function of the step alone; n counts from 1; the probability stays within [final, 1].
    """

    def __init__(self, final: float, flat_start: int) -> None:
        self.final, self.flat_start = final, flat_start
        self.waited, self.done = 0, 0
        self.table = [0]  # by step: which update it is, 0 where it is none

    def __call__(self, step: int) -> int:
        """The number of this step's update, 0 where the step has none."""
        while len(self.table) <= step:
            share = max(self.final, exp(min(0.0, -0.001 * (len(self.table) - self.flat_start))))
            self.waited += 1
            due = self.waited >= 1 / share
            if due:
                self.waited, self.done = 0, self.done + 1
            self.table.append(self.done if due else 0)
        return self.table[step]


@dataclass
class _Item:
    """One region of one matrix: blocks of momentum and noise, (b, c) or (B, b, c), and the noise's share in damping."""

    matrix: int
    region: int
    moment: Tensor
    noise: Tensor | None
    damping: float | Tensor


@register
class Kron(NarrowOptimizer):
    """m ← EMA(g/‖g‖), bias-corrected;  Q₀, Q₁ learnt so that QᵀQ whitens m;  direction = Q₀ᵀQ₀·m·Q₁ᵀQ₁, RMS ≤ 1.1."""

    name: ClassVar[str] = "kron"
    Config: ClassVar[type] = KronConfig
    vectors: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.clip = not config.normalize_grads  # type: ignore[misc]  # a norm of one needs no clip
        self.schedule = UpdateSchedule(config.update_probability, config.update_flat_start)
        self.plan = Planner(self.grid, self.diagonal)
        self._generators: dict[torch.device, torch.Generator] = {}

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
        state = self.moments(weight, ("exp_avg",))
        kept = torch.bfloat16 if self.config.factor_precision == "bf16" else weight.dtype
        scale = self.config.preconditioner_init_scale ** (1 / len(info.shape))
        for region, (count, *block) in enumerate(self.grid(info).shapes()):
            for side, flat in enumerate(self.diagonal(info)):
                eye = weight.new_ones(block[side])
                eye = eye if flat else torch.eye(block[side], dtype=weight.dtype, device=weight.device)
                state[f"q_{region}_{side}"] = (scale * eye).expand(count, *eye.shape).to(kept).contiguous()
                if self.config.update_form == "procrustes":
                    state[f"bound_{region}_{side}"] = weight.new_ones(count)
        return state

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        spec = self.moments_spec(("exp_avg",))
        for region in range(len(self.grid(info).shapes())):
            for side, flat in enumerate(self.diagonal(info)):
                spec[f"q_{region}_{side}"] = StateKind.SHARED if flat else StateKind.BLOCKS
                if self.config.update_form == "procrustes":
                    spec[f"bound_{region}_{side}"] = StateKind.SHARED
        return spec

    def noise(self, info: MatrixInfo, step: int, like: Tensor) -> Tensor:
        """Gaussian (m, n), a function of the matrix's name and the step."""
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device)
        generator = self._generators[like.device].manual_seed(zlib.crc32(info.name.encode()) * 2**20 + step)
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device=like.device).to(like.dtype)

    def _moments(self, grads: Sequence[Tensor], states: Sequence[State], step: int) -> list[Tensor]:
        """Bias-corrected momenta (m, n), advanced by these gradients, in their place."""
        grads, momenta = list(grads), [state["exp_avg"] for state in states]
        if self.config.normalize_grads:
            norms = torch._foreach_norm(grads)
            torch._foreach_add_(norms, 1e-16)
            torch._foreach_div_(grads, norms)
        torch._foreach_lerp_(momenta, grads, 1 - self.config.beta1)
        torch._foreach_copy_(grads, momenta)
        torch._foreach_div_(grads, 1 - self.config.beta1**step)
        return [as_matrix(grad) for grad in grads]

    def directions(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        cfg, number, plan = self.config, self.schedule(step), self.plan(grads, infos)
        moments = self._moments(grads, states, step)
        means: Sequence[Any] = [0.0] * len(moments)
        learn = [False] * len(moments)
        if number and moments:
            sums: Sequence[Any] = torch._foreach_norm(moments, 1)
            # zeros teach nothing: known here on the CPU, found on a GPU, for which the host does not wait
            sums = torch.stack(tuple(sums)).tolist() if moments[0].device.type == "cpu" else sums
            means = [total / max(moment.numel(), 1) for total, moment in zip(sums, moments)]
            learn = [isinstance(mean, Tensor) or mean > 0 for mean in means]
        cuts = {i: self._cut(i, moments[i], means[i], learn[i], infos[i], step) for i in plan.cut}
        chunk = _CHUNK if moments and products.available(moments[0]) else max(len(moments), 1)
        by_block: dict[tuple[int, int], Tensor] = {}
        for batch in plan.batches:
            for learns in (False, True):
                members = [member for member in batch.members if learn[member[0]] == learns]
                for first in range(0, len(members), chunk):
                    items = []
                    for index, region in members[first : first + chunk]:
                        if batch.whole:
                            moment, mean = moments[index], means[index]
                            noise = self.noise(infos[index], step, moment) if learns else None
                            items.append(_Item(index, region, moment, noise, _DAMPING * mean))
                        else:
                            items.append(cuts[index][region])
                    self._step_items(items, batch.kind, states, number, by_block)
        for index in plan.cut:
            blocks = [by_block[index, region] for region in range(len(cuts[index]))]
            self.grid(infos[index]).join(blocks, moments[index])
        moved = [i for (i, _), direction in by_block.items() if i not in cuts and direction is not moments[i]]
        if moved:
            torch._foreach_copy_([moments[i] for i in moved], [by_block[i, 0] for i in moved])
        if cfg.max_update_rms and moments:
            scales = list(torch._foreach_norm(moments))
            torch._foreach_div_(scales, [cfg.max_update_rms * max(moment.numel(), 1) ** 0.5 for moment in moments])
            torch._foreach_clamp_min_(scales, 1.0)
            torch._foreach_div_(moments, scales)
        return list(grads)

    def _cut(
        self, index: int, moment: Tensor, mean: float | Tensor, learns: bool, info: MatrixInfo, step: int
    ) -> list[_Item]:
        """Regions of a matrix of several blocks."""
        grid = self.grid(info)
        stacks = grid.cut(moment)
        noises: list[Tensor | None] = [None] * len(stacks)
        if learns:
            noises = list(grid.cut(self.noise(info, step, moment)))
        return [_Item(index, region, *pair, _DAMPING * mean) for region, pair in enumerate(zip(stacks, noises))]

    def _step_items(
        self,
        items: Sequence[_Item],
        flat: tuple[bool, ...],
        states: Sequence[State],
        number: int,
        block_directions: dict[tuple[int, int], Tensor],
    ) -> None:
        """Preconditioned momentum of equal blocks of many matrices to `found`; factors change in place."""
        procrustes = self.config.update_form == "procrustes"
        in_place = {
            (kind, side): [states[item.matrix][f"{kind}_{item.region}_{side}"] for item in items]
            for kind in (("q", "bound") if procrustes else ("q",))
            for side in range(len(flat))
        }
        moments = [item.moment for item in items]
        noises = [item.noise for item in items if item.noise is not None]
        every, lr = self.config.balance_every, self.config.preconditioner_lr
        if noises and every and number % every == 0:
            for pair in zip(*(in_place["q", side] for side in range(len(flat)))):
                preconditioner.balance(dict(enumerate(pair)))
        matrices = in_place["q", 0] + in_place["q", 1] if len(flat) == 2 else []
        if not procrustes and flat == (False, False) and projection.taken([*moments, *noises], matrices):
            dampings = [float(item.damping) for item in items if item.noise is not None]
            preconditioner.kron_step(in_place["q", 0], in_place["q", 1], moments, noises, dampings, lr)
            block_directions.update({(item.matrix, item.region): item.moment for item in items})
            return
        tensors = {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in in_place.items()}
        factors = {side: tensors["q", side] for side in range(len(flat))}
        moment = batched(moments)
        if noises:
            noise = batched(noises)
            each: Any = [
                item.damping for item in items for _ in range(1 if item.moment.ndim == 2 else len(item.moment))
            ]
            on_gpu = isinstance(each[0], Tensor)
            damping = torch.stack(each) if on_gpu else moment.new_tensor(each)
            damped = moment + damping.view(-1, 1, 1) * noise
            teaches = damping > 0
            if procrustes:
                bounds = {side: tensors["bound", side] for side in range(len(flat))}
                before = {key: tensor.clone() for key, tensor in tensors.items()} if on_gpu else {}
                preconditioner.procrustes_update(factors, bounds, damped, lr)
                for key, old in before.items():
                    taught = teaches.view(-1, *[1] * (old.ndim - 1))
                    tensors[key].copy_(torch.where(taught, tensors[key], old))
            else:
                preconditioner.triangular_update(factors, damped, noise, lr * teaches if on_gpu else lr)
            for key, parts in in_place.items():
                if len(parts) > 1:
                    torch._foreach_copy_(parts, list(tensors[key].split([len(part) for part in parts])))
        result = preconditioner.precondition(moment, factors, not procrustes)
        block_directions.update(zip([(item.matrix, item.region) for item in items], apart(result, moments)))

    def width_exponent(self) -> float:
        """Whitened: a flat spectrum with elements of about 1, whose norm grows by √r."""
        return -0.5

    def cost(self, info: MatrixInfo) -> Cost:
        apply, refresh, state = 0.0, {"gemm": 0.0, "solve": 0.0}, 0.0
        rows, columns = (*info.shape, 1)[:2]
        procrustes, wide = (
            self.config.update_form == "procrustes",
            2.0 if self.config.factor_precision == "bf16" else 4.0,
        )
        for count, *block in self.grid(info).shapes():
            for side, flat in enumerate(self.diagonal(info)):
                size, other = block[side], block[1 - side]
                state += wide * count * (size if flat else size * size) + 4.0 * count * procrustes
                if flat:
                    continue
                apply += 4.0 * count * size * size * other
                if procrustes:  # P·g, its moment; moment·Q, R·Q, R·R·Q; two bounds
                    refresh["gemm"] += count * (6.0 * size * size * other + 6.0 * size**3 + 8.0 * size**2)
                else:  # Q·g, two moments; step·Q; one bound; one solve
                    refresh["gemm"] += count * (6.0 * size * size * other + 2.0 * size**3 + 4.0 * size**2)
                    refresh["solve"] += count * float(size * size * other)
        large = max(max(shape[1:]) for shape in self.grid(info).shapes()) > SMALL
        cost = Cost(
            flops={"gemm" if large else "small_gemm": apply} if apply else {},
            refresh={key: value for key, value in refresh.items() if value},
            refresh_every=1 / self.config.update_probability,
            elementwise_bytes=4.0 * 14 * rows * columns,
            state_bytes=state + self.moment_bytes(rows * columns),
        )
        return self.with_conversion(cost)
