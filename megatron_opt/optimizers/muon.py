"""Muon: momentum, orthogonalized.

kellerjordan.github.io/posts/muon, arXiv 2502.16982; row normalization (NorMuon) arXiv 2510.05491.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.kernels import multi_tensor, quantize
from megatron_opt.kernels import orthogonalize as ns
from megatron_opt.kernels.multi_tensor import Coefficients, UpdateKind
from megatron_opt.optimizers import sharded_orthogonalization as sharded
from megatron_opt.optimizers.base import Cost, MatrixInfo, MatrixOptimizer, Scalars, Shape, State, StateKind, StateSpec
from megatron_opt.optimizers.options import OptionError, check, choice, decay, epsilon, number, option
from megatron_opt.optimizers.partition import Collective, Partition, ShardStep, all_reduce, in_proportion, shares
from megatron_opt.optimizers.registry import register

SCALE_MODES = ("shape_scaling", "spectral", "unit_rms_norm", "none")
MOMENTUM_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}  # None: the weight's own
MOMENTUM_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}


def shape_scale(shape: Shape, mode: str) -> float:
    """√max(1, out/in) `shape_scaling`, √max(out, in) `spectral`, √(out/in) `unit_rms_norm`, 1 `none`."""
    rows, columns = shape
    match mode:
        case "shape_scaling":
            return max(1.0, rows / columns) ** 0.5
        case "spectral":
            return float(max(rows, columns)) ** 0.5
        case "unit_rms_norm":
            return (rows / columns) ** 0.5
    return 1.0


@dataclass(frozen=True)
class SpectralConfig:
    """What every rule built on orthogonalized momentum shares."""

    scale_mode: str = choice("shape_scaling", SCALE_MODES, "factor by the matrix's shape (out, in)")
    extra_scale_factor: float = option(
        1.0, "further factor on the update; 0.2 with spectral matches AdamW's RMS", above=0, high=1e6
    )
    num_ns_steps: int = option(5, "Newton–Schulz steps", low=1, high=100)
    coefficient_type: str = choice("simple", (*ns.SETS, "custom"), "Newton–Schulz coefficients")
    custom_coefficients: tuple[tuple[float, float, float], ...] = option((), "(a, b, c) per step for `custom`")
    fp32_matmul_prec: str = choice("medium", tuple(ns.ITERATION_DTYPES), "iterate in bf16 (medium) or fp32")
    norm_form: str = choice("add", ("add", "max"), "divide by ‖u‖ + eps or by max(‖u‖, eps)")
    momentum_dtype: str = choice("fp32", tuple(MOMENTUM_DTYPES), "the momentum in fp32, bf16 or 8-bit blocks of 2048")

    def __post_init__(self) -> None:
        check(self)
        if bool(self.custom_coefficients) != (self.coefficient_type == "custom"):
            raise OptionError(
                "custom_coefficients", "goes with coefficient_type custom, and only with it; give both or none."
            )
        if self.custom_coefficients:
            _check_coefficients(self.custom_coefficients, self.num_ns_steps)


def _check_coefficients(custom: Any, steps: int) -> None:
    """Refuse what are no triples of finite numbers, or would drive a singular value in [0, 1] beyond 100."""
    triples = [[number(value) for value in row] if isinstance(row, list | tuple) else [] for row in custom]
    if any(len(row) != 3 or not all(value is not None and isfinite(value) for value in row) for row in triples):
        raise OptionError(
            "custom_coefficients", f"are {custom!r}; they must be lists of three finite numbers, a, b, c."
        )
    if not ns.bounded(ns.coefficients("custom", steps, custom)):
        raise OptionError("custom_coefficients", "drive singular values away from 1, beyond 100; mend them.")


@dataclass(frozen=True)
class MuonConfig(SpectralConfig):
    """Hyperparameters of Muon; tuned values of the study."""

    momentum: float = decay(0.98, "momentum μ (tuned: 0.95 for the smallest budget, else 0.98)")
    nesterov: bool = option(True, "orthogonalize μ·buf + g in place of buf")
    momentum_form: str = choice("sum", ("sum", "ema"), "buf ← μ·buf + g, or μ·buf + (1−μ)·g")
    eps: float = option(1e-5, "added to the norm, whose squares fp32 must hold", low=1e-15, high=1.0)
    normuon: bool = option(False, "normalize rows by their running second moment, keeping the norm (NorMuon)")
    normuon_beta2: float = decay(0.95, "decay of NorMuon's second moment", needs=("normuon", True))
    normuon_eps: float = epsilon(1e-10, "added to the square root of NorMuon's second moment", needs=("normuon", True))


class SpectralOptimizer(MatrixOptimizer):
    """Orthogonalize a momentum and scale by shape; the momentum is the subclass's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = ns.coefficients(config.coefficient_type, config.num_ns_steps, config.custom_coefficients)

    def weights(self) -> tuple[float, float, float, float]:
        """(a, b, c, d) of buf ← a·buf + b·g and of what is orthogonalized, c·buf + d·g."""
        raise NotImplementedError

    def width_exponent(self) -> float:
        """An orthogonal matrix keeps its spectral norm."""
        return -0.5 if self.config.scale_mode == "spectral" else 0.0

    def momentum(self, buffer: Tensor, grad: Tensor) -> None:
        """Advance the momentum in place; both have the gradient's dtype."""
        keep, gain, _, _ = self.weights()
        buffer.mul_(keep).add_(grad, alpha=gain)

    def direction(self, grad: Tensor, buffer: Tensor) -> Tensor:
        """What is orthogonalized, from the gradient and the new momentum."""
        _, _, momentum_weight, gradient_weight = self.weights()
        return (gradient_weight * grad).add_(buffer, alpha=momentum_weight) if gradient_weight else buffer

    @property
    def eps(self) -> float:
        """Added to the norm before the iteration."""
        return self.config.eps

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        if len(info.shape) != 2:
            raise UserError(
                f"{self.name} needs matrices, {info.name} has shape {info.shape}; route it to another optimizer."
            )
        dtype = MOMENTUM_DTYPES[self.config.momentum_dtype] or weight.dtype
        state = {"momentum_buffer": torch.zeros_like(weight, dtype=dtype)}
        if dtype == torch.int8:
            state["momentum_absmax"] = weight.new_zeros(quantize.blocks(weight.numel()), dtype=torch.float32)
        return state

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        spec = {"momentum_buffer": StateKind.MATRIX}
        return spec | ({"momentum_absmax": StateKind.SHARED} if self.config.momentum_dtype == "int8" else {})

    def _load(self, state: State, dtype: torch.dtype) -> Tensor:
        buffer = state["momentum_buffer"]
        if buffer.dtype == torch.int8:
            return quantize.decode_signed(buffer, state["momentum_absmax"]).to(dtype)
        return buffer.to(dtype)

    def advance(self, grad: Tensor, state: State) -> Tensor:
        """One momentum step; returns what is orthogonalized."""
        buffer = self._load(state, grad.dtype)
        self.momentum(buffer, grad)
        momentum = state["momentum_buffer"]
        if momentum.dtype == torch.int8:
            state["momentum_absmax"].copy_(quantize.block_absmax(buffer))
            momentum.copy_(quantize.encode_signed(buffer, state["momentum_absmax"]))
        elif momentum is not buffer:
            momentum.copy_(buffer)
        return self.direction(grad, self._load(state, grad.dtype))

    def factor(self, info: MatrixInfo) -> float:
        """Scale of the orthogonal matrix."""
        return self.config.extra_scale_factor * shape_scale(info.shape, self.config.scale_mode)

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        moments = self.advance_all(grads, states)
        cfg = self.config
        results = ns.orthogonalize(moments, self.table, self.eps, cfg.fp32_matmul_prec, cfg.norm_form)
        return [self.rescale(x, state, info) for x, state, info in zip(results, states, infos)]

    def advance_all(self, grads: Sequence[Tensor], states: Sequence[State]) -> list[Tensor]:
        """`advance` for all matrices, in one pass of the fused kernel where gradient and momentum are of one type."""
        momenta = [state["momentum_buffer"] for state in states]
        if any(h.dtype != g.dtype or not g.is_contiguous() for h, g in zip(momenta, grads)):
            return [self.advance(grad, state) for grad, state in zip(grads, states)]
        keep, gain, momentum_weight, gradient_weight = self.weights()
        moments = [torch.empty_like(grad) for grad in grads]
        c = Coefficients(
            beta1=keep, input_weight1=gain, momentum_weight=momentum_weight, gradient_weight=gradient_weight
        )
        multi_tensor.update(UpdateKind.MOMENTUM, (), grads, [momenta], c, copies=moments)
        return moments

    def rescale(self, x: Tensor, state: State, info: MatrixInfo) -> Tensor:
        """What follows the orthogonalization of a whole matrix."""
        factor = self.factor(info)
        return x if factor == 1.0 else x.mul_(factor)

    def cost(self, info: MatrixInfo) -> Cost:
        k, K = sorted(info.shape)
        kind = "gemm" if k > 128 else "small_gemm"
        width, scales = MOMENTUM_BYTES[self.config.momentum_dtype], 0.0
        if self.config.momentum_dtype == "int8":
            scales = 4.0 * quantize.blocks(k * K)
        # grad, momentum in and out, norm, normalized copy, scaled result
        return Cost(
            flops={kind: ns.flops(k, K, self.table, self.config.fp32_matmul_prec)},
            elementwise_bytes=k * K * (2.0 * width + 6 * 4),
            state_bytes=width * k * K + scales,
        )

    @property
    def shards(self) -> type["SpectralPartition"]:
        """How a matrix is computed in shards."""
        return SpectralPartition

    def partition(self, info: MatrixInfo) -> Partition | None:
        """Shards of the longer side: the Gram matrix is then the small one. 8-bit blocks run over rows: whole only."""
        if self.config.momentum_dtype == "int8":
            return None
        return self.shards(self, info, shard_dim=0 if info.shape[0] > info.shape[1] else 1)


class SpectralPartition(Partition):
    """Shards of a matrix whose momentum is orthogonalized: see sharded_orthogonalization.py."""

    optimizer: SpectralOptimizer

    def collectives(self, edges: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Collective]:
        k, K = sorted(self.info.shape)
        work = ns.ITERATION_DTYPES[self.optimizer.config.fp32_matmul_prec] or dtype
        squares = all_reduce(len(edges) - 1, 1, torch.float64)
        return [squares, *sharded.collectives(k, K, in_proportion(k, edges), work, self.optimizer.table)]

    def step(
        self, grad: Tensor, state: State, shared: State, step: int, index: int, edges: tuple[int, ...]
    ) -> ShardStep:
        optimizer, cfg, wide = self.optimizer, self.optimizer.config, self.shard_dim == 1
        (u,) = optimizer.advance_all([grad], [state])
        k, K = sorted(self.info.shape)
        squares = yield u.double().square().sum().view(1, 1)
        norm = squares.sum().sqrt().to(u.dtype)
        x = u if wide else u.mT
        x = (x * ns.scale_to_unit(norm, optimizer.eps, cfg.norm_form)).contiguous()
        x = x.to(ns.ITERATION_DTYPES[cfg.fp32_matmul_prec] or x.dtype)
        y = yield from sharded.iterate(x, K, in_proportion(k, edges), index, optimizer.table)
        y = y.to(grad.dtype)
        y = yield from self.rescale(y if wide else y.mT, state)
        return y * optimizer.factor(self.info)

    def rescale(self, x: Tensor, state: State) -> ShardStep:
        """What follows the orthogonalization of a shard, but for the factor."""
        yield from ()
        return x


class NorMuonPartition(SpectralPartition):
    """Shards of columns sum rows' squares and then know all rows; shards of rows sum two squared norms."""

    def collectives(self, edges: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Collective]:
        sums = self.info.shape[0] if self.shard_dim == 1 else 2
        return [*super().collectives(edges, dtype), all_reduce(len(edges) - 1, sums, torch.float64)]

    def rescale(self, x: Tensor, state: State) -> ShardStep:
        cfg, squares = self.optimizer.config, x.double().square().sum(dim=1)
        if self.shard_dim == 1:
            squares = (yield squares.view(1, -1)).sum(dim=0)
        moment = state["row_second_moment"]
        moment.lerp_((squares / self.info.shape[1]).to(moment.dtype).view(-1, 1), 1 - cfg.normuon_beta2)
        scale = 1.0 / (moment.sqrt() + cfg.normuon_eps)
        norms = torch.stack([squares.sum(), (squares * scale.flatten().double().square()).sum()])
        if self.shard_dim == 0:
            norms = (yield norms.view(1, -1)).sum(dim=0)
        before, after = norms.sqrt()
        return x * scale * (before / after.clamp_min(torch.finfo(x.dtype).tiny)).to(x.dtype)

    def shard_costs(self, edges: tuple[int, ...]) -> list[Cost]:
        costs = super().shard_costs(edges)
        if self.shard_dim == 0:
            return costs
        moments = 4.0 * self.info.shape[0]  # with every shard
        return [
            replace(cost, state_bytes=cost.state_bytes + (1 - share) * moments)
            for cost, share in zip(costs, shares(edges), strict=True)
        ]


@register
class Muon(SpectralOptimizer):
    """buf ← μ·buf + g;  u = μ·buf + g;  O = NS(u/(‖u‖_F + ε));  direction = √max(1, out/in)·O."""

    name: ClassVar[str] = "muon"
    Config: ClassVar[type] = MuonConfig
    scalars: ClassVar[Scalars] = Scalars("adamw", 0.3, {"beta1": 0.8, "beta2": 0.98, "eps": 1e-15})  # the study's

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        return super().state_spec(info) | ({"row_second_moment": StateKind.ROWS} if self.config.normuon else {})

    def weights(self) -> tuple[float, float, float, float]:
        mu = self.config.momentum
        gain = 1.0 - mu if self.config.momentum_form == "ema" else 1.0
        return (mu, gain, mu, gain) if self.config.nesterov else (mu, gain, 1.0, 0.0)

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        rows = {"row_second_moment": weight.new_zeros(len(weight), 1)} if self.config.normuon else {}
        return super().init_state(weight, info) | rows

    @property
    def shards(self) -> type[SpectralPartition]:
        return NorMuonPartition if self.config.normuon else SpectralPartition

    def rescale(self, x: Tensor, state: State, info: MatrixInfo) -> Tensor:
        if self.config.normuon:
            moment = state["row_second_moment"]
            moment.lerp_(x.square().mean(dim=1, keepdim=True), 1 - self.config.normuon_beta2)
            rows = x / (moment.sqrt() + self.config.normuon_eps)
            # row norms change, the matrix's norm does not
            x = rows * (x.norm() / rows.norm().clamp_min(torch.finfo(x.dtype).tiny))
        return super().rescale(x, state, info)

    def cost(self, info: MatrixInfo) -> Cost:
        cost = super().cost(info)
        if not self.config.normuon:
            return cost
        rows, columns = info.shape
        return Cost(
            cost.flops,
            elementwise_bytes=cost.elementwise_bytes + 5 * 4.0 * rows * columns,
            state_bytes=cost.state_bytes + 4.0 * rows,
        )
