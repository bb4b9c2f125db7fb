"""What every optimizer is: a rule on whole logical matrices, or one on single elements. No process group in sight."""

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.optimizers.partition import Partition

State = dict[str, Tensor]
Shape = tuple[int, ...]


class StateKind(enum.Enum):
    """What a tensor of a matrix's state is, and so where a checkpoint keeps it.

    MATRIX: of the matrix's shape (m, n). ROWS: one element a row, (m,) or (m, 1). BLOCKS: a stack of square blocks
    (B, k, k). NORM: (1,), a norm of the whole matrix, with every part of it. FLAG: (1,), 1 from the first gradient on, with
    every part and on the CPU, where no step waits for it. SHARED: any other, alike at every part.
    """

    MATRIX = enum.auto()
    ROWS = enum.auto()
    BLOCKS = enum.auto()
    SHARED = enum.auto()
    NORM = enum.auto()
    FLAG = enum.auto()


StateSpec = dict[str, StateKind]
DECAY_MODES = ("decoupled", "independent", "cautious")
_OTHER_TABLES = ("position", "tokentype")  # embeddings of something else than words


def decay_factor(lr: float, weight_decay: float, mode: str) -> float:
    """Share of a weight that decay takes in a step: lr·wd, or wd where it is independent; UserError for another mode."""
    if mode not in DECAY_MODES:
        raise UserError(f"there is no decay mode {mode!r}; there are {', '.join(DECAY_MODES)}.")
    return weight_decay if mode == "independent" else lr * weight_decay


def norm_of(weight: Tensor) -> Tensor:
    """Frobenius norm of a weight, (1,) in its dtype, summed in fp64."""
    return torch.linalg.vector_norm(weight.double()).to(weight.dtype).view(1)


@dataclass(frozen=True)
class Cost:
    """What one matrix costs in one step; ownership packs by it and the cost model reads it.

    `flops` is the FLOPs of an ordinary step by kernel class (`gemm`, `small_gemm`, `qr`, `eigh`, `solve`),
    `refresh` the FLOPs added by a refresh step, which comes once in `refresh_every` steps;
    `elementwise_bytes` is the memory traffic of passes over the matrix; `state_bytes` what stays between steps.
    """

    flops: dict[str, float] = field(default_factory=dict)
    refresh: dict[str, float] = field(default_factory=dict)
    refresh_every: float = 1.0
    elementwise_bytes: float = 0.0
    state_bytes: float = 0.0

    def mean_flops(self) -> float:
        """FLOPs per step, refreshes spread evenly."""
        return sum(self.flops.values()) + sum(self.refresh.values()) / self.refresh_every

    def scaled(self, share: float) -> "Cost":
        """A share of everything."""
        return Cost(
            {kind: share * count for kind, count in self.flops.items()},
            {kind: share * count for kind, count in self.refresh.items()},
            self.refresh_every,
            share * self.elementwise_bytes,
            share * self.state_bytes,
        )


@dataclass(frozen=True)
class Scalars:
    """Who trains what is no hidden matrix: an optimizer, its factor on the learning rate, and its tuned options."""

    optimizer: str
    lr_scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixInfo:
    """A logical matrix as an optimizer may see it.

    `name` is global (`decoder.layers.3.self_attention.linear_qkv.weight.q`), `shape` is the whole matrix as
    (out, in) or (n,), `kind` one of `hidden`, `embedding`, `output`, `router`, `norm`, `bias`, `ssm` (Mamba's vectors), `role` what a
    layer calls it (`q`, `k`, `v`, `attention_output`, `gate`, `up`, `down`, …); `heads` is the number of equal blocks
    of rows that belong to one head (or KV group for q), 1 where there are none.
    """

    name: str
    shape: Shape
    kind: str = "hidden"
    role: str = ""
    heads: int = 1

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return math.prod(self.shape)

    @property
    def rows_are_tokens(self) -> bool:
        """Whether side 0 is the vocabulary: the word embedding and the output layer."""
        return self.kind in ("embedding", "output") and len(self.shape) == 2 and self.role not in _OTHER_TABLES


class MatrixOptimizer:
    """A rule that sees whole logical matrices and returns the direction u; the caller does W ← W − lr·(u + wd·W).

    `Config` is a frozen dataclass whose fields are the rule's hyperparameters and become flags `--NAME-FIELD`.
    State tensors have the weight's dtype (fp32; fp64 in tests) unless the config says otherwise, live on the matrix's
    device (flags on the CPU), and are never resized.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    clip: ClassVar[bool] = False  # whether the study clips this rule's gradients by global norm
    vectors: ClassVar[bool] = False  # whether 1-D parameters are welcome
    projects: ClassVar[bool] = False  # whether steps are rescaled to a fixed norm (Hyperball)
    scalars: ClassVar[Scalars | None] = None  # None: it takes all parameters
    clipped_kinds: ClassVar[tuple[str, ...]] = ()  # with `clip` False: kinds that are clipped all the same

    def __init__(self, config: Any) -> None:
        self.config = config

    def init_state(self, weight: Tensor, info: MatrixInfo) -> State:
        """State before the first step, from the initial weight (out, in) in fp32."""
        raise NotImplementedError

    def state_spec(self, info: MatrixInfo) -> StateSpec:
        """What each tensor of the state is, with a slice and shared ones too; of the matrix's shape by default."""
        return dict.fromkeys(self.init_state(torch.empty(info.shape, device="meta"), info), StateKind.MATRIX)

    def keys(self, kind: StateKind, info: MatrixInfo) -> list[str]:
        """The state's tensors of a kind."""
        return [key for key, other in self.state_spec(info).items() if other is kind]

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], step: int, infos: Sequence[MatrixInfo]
    ) -> list[Tensor]:
        """Directions for many matrices; `step` counts from 1; states change in place.

        A direction may lie in its gradient's memory: callers keep no gradient.
        """
        raise NotImplementedError

    def cost(self, info: MatrixInfo) -> Cost:
        """FLOPs and bytes of one step on one whole matrix."""
        raise NotImplementedError

    def width_exponent(self) -> float:
        """µP: e in lr ∝ rᵉ for hidden matrices at r times the base width; UserError where it is not known."""
        raise UserError(
            f"it is not known how {self.name}'s learning rate follows the width; train without a base width."
        )

    def projection(self, squared_norm: Tensor, state: State) -> Tensor:
        """Factor to the norm that the rule keeps, from the whole matrix's squared one (rules with `projects`, no decay).

        On the weight after the step, and on the direction of a matrix in parts.
        """
        raise NotImplementedError

    def check_state(self, state: State, info: MatrixInfo) -> None:
        """Refuse a state, its NORMs filled in, that the rule cannot begin with."""

    def partition(self, info: MatrixInfo) -> Partition | None:
        """How ranks may share the matrix, or a rectangle of its tiles whose shape is in `info`; None where it stays whole."""
        return None


@dataclass
class Reducer:
    """Sums that a flat shard cannot see by itself; the default is for whole tensors on one process.

    `per_matrix` takes one value a piece and returns, for each piece, the sum over all pieces of its logical matrix on
    all ranks; `global_sum` (k,) is the sum of the rule's `global_sum_terms` over all that it trains, None where this call has all
    of it; `numel` is the size of the whole logical matrix of each piece.
    """

    numel: Sequence[int]
    per_matrix: Callable[[Tensor], Tensor] = lambda values: values
    global_sum: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """How one step of an element-wise rule is made, beside its tensors; see `ElementwiseOptimizer.update`."""

    number: int
    lr: float
    decay_factor: float  # weight decay of this step: lr·wd where it is decoupled
    grad_scale: float
    cautious_decay: bool
    copies: Sequence[Tensor]
    element_offsets: Sequence[int]


class ElementwiseOptimizer:
    """A rule on single elements, exact on any flat shard; updates parameters in place through one fused kernel."""

    name: ClassVar[str]
    Config: ClassVar[type]
    clip: ClassVar[bool] = True
    projects: ClassVar[bool] = False
    scalars: ClassVar[Scalars | None] = None
    clipped_kinds: ClassVar[tuple[str, ...]] = ()
    state_keys: ClassVar[tuple[str, ...]]  # each has the shape of the parameter, fp32 unless the config says otherwise;
    # an 8-bit state has besides it `KEY_absmax`, one fp32 number for each 2048 elements
    weight_keys: ClassVar[tuple[str, ...]] = ()  # states that begin as the weights
    lead_key: ClassVar[str | None] = None  # the state that weights to evaluate and export are without: x = p − state
    own_schedule: ClassVar[bool] = False  # whether the rule takes the place of a decaying learning rate
    one_rate: ClassVar[bool] = False  # whether all its groups must have one learning rate

    def __init__(self, config: Any) -> None:
        self.config = config
        self.numbers: dict[str, Any] = {}  # of the whole rule, the same on every rank; in checkpoints as floats

    def init_state(self, param: Tensor) -> State:
        """Zeros for every state key."""
        return {key: torch.zeros_like(param, dtype=torch.float32) for key in self.state_keys}

    def global_sum_terms(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        step: int,
        lr: float,
        grad_scale: float = 1.0,
    ) -> Tensor | None:
        """What a step needs sums of over all that the rule trains, (pieces, k); None where nothing. States stay."""
        return None

    def advance(self, step: int, lr: float, sums: Tensor | None) -> None:
        """`numbers` of this step, once before its updates; `sums` (k,) are those of `global_sum_terms` over all ranks."""

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        step: int,
        lr: float,
        weight_decay: float,
        reducer: Reducer | None = None,
        *,
        grad_scale: float = 1.0,
        decay_mode: str = "decoupled",
        copies: Sequence[Tensor] = (),
        element_offsets: Sequence[int] = (),
    ) -> None:
        """One step on many contiguous pieces, each inside one logical matrix; p ← p − lr·(u + wd·p).

        `step` counts from 1. Gradients are multiplied by `grad_scale` (clipping, loss scale) on the way.
        `decay_mode` is `decoupled` (lr·wd·p), `independent` (wd·p) or `cautious` (lr·wd·p where u·p ≥ 0).
        `copies` are the model's bf16 weights, written in the same pass. `element_offsets` numbers each piece's
        first element in the whole model, so that stochastic rounding does not depend on how it is cut.
        Raises UserError for another decay mode.
        """
        how = Step(
            step,
            lr,
            decay_factor(lr, weight_decay, decay_mode),
            grad_scale,
            decay_mode == "cautious",
            copies,
            element_offsets,
        )
        self.apply(params, grads, states, how, reducer or Reducer([p.numel() for p in params]))

    def apply(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], how: Step, reducer: Reducer
    ) -> None:
        """The step of `update`."""
        raise NotImplementedError

    def width_exponent(self) -> float:
        """µP: e in lr ∝ rᵉ for hidden matrices; steps of the same size in every element."""
        return -1.0

    def cost(self, numel: int) -> Cost:
        """Bytes of one step on `numel` elements."""
        raise NotImplementedError
