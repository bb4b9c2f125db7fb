"""What a study is: what is compared, on what, how it is tuned, and where it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.study.models import Model

PHASES = ("grid", "descent", "restricted", "predict", "seeds", "transfer")
PARAMETRIZATIONS = ("standard", "mup")
MUP = "mup"
"""the hyperparameter that names the base model of a run under µP"""


@dataclass(frozen=True, order=True)
class Regime:
    """One model at one Chinchilla ratio, written `model@4x`; `model@4x-2ep` reads half as many unique tokens twice."""

    model: str
    ratio: float
    epochs: int = 1

    def __str__(self) -> str:
        return f"{self.model}@{self.ratio:g}x" + (f"-{self.epochs}ep" if self.epochs > 1 else "")

    @classmethod
    def parse(cls, text: str) -> Regime:
        model, _, rest = text.rpartition("@")
        match = re.fullmatch(r"([^-]+?)x?(?:-([1-9][0-9]*)ep)?", rest)
        try:
            if match is None:
                raise ValueError(rest)
            return cls(model, float(match[1]), int(match[2] or 1))
        except ValueError:
            raise UserError(
                f"{text!r} is not a regime; write MODEL@RATIO, such as 130m@4x, or 130m@4x-2ep for two epochs"
            ) from None


@dataclass(frozen=True)
class OptimizerSpace:
    """One optimizer of the study: its start, and the grid of each hyperparameter that is searched."""

    name: str
    optimizer: str
    """what `--optimizer` is given; several entries may share it"""
    start: dict[str, Any]
    grid: dict[str, tuple]

    def points(self) -> list[dict[str, Any]]:
        """Every point of the full grid, in the grid's order."""
        return [self.start | dict(zip(self.grid, values)) for values in product(*self.grid.values())]


@dataclass(frozen=True)
class Data:
    """Indexed-dataset prefixes and the tokenizer that made them."""

    tokenizer: str
    tokenizer_type: str = "SentencePieceTokenizer"
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    split: str | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class Phase:
    """One step of the method and the regimes it covers."""

    kind: str
    regimes: tuple[Regime, ...]
    optimizers: tuple[str, ...] = ()
    """none: all of the study"""
    registered: bool = False
    """no run is started before predictions of these regimes are registered"""
    proxy: Regime | None = None
    """of a transfer: where hyperparameters are tuned, to be carried to `regimes`"""
    parametrizations: tuple[str, ...] = PARAMETRIZATIONS
    sweep: bool = True
    """of a transfer: the learning rate is swept at the wider models too, and not only carried there"""

    @property
    def title(self) -> str:
        """The kind, and of transfers, of which there may be several, where to."""
        return f"transfer to {', '.join(map(str, self.regimes))}" if self.kind == "transfer" else self.kind


@dataclass(frozen=True)
class ExecutorSettings:
    """Where and how runs are started."""

    kind: str = "local"
    jobs: int | None = None
    """runs at once; None: as many as the cores or GPUs hold"""
    ranks: int = 1
    """processes of one run"""
    nodes: int = 1
    retries: int = 2
    preemptions: int = 100
    timeout_minutes: float | None = None
    command: tuple[str, ...] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    flops_per_s: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Tasks on which runs' last checkpoints are evaluated, as `megatron-opt eval` takes them."""

    tasks: tuple[str, ...]
    tasks_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    average: int | None = None
    """the mean of so many last checkpoints' weights is evaluated too"""
    ema: bool = False
    """the moving average of weights is evaluated too"""
    models: tuple[str, ...] = ()
    """none: all of the study"""


@dataclass(frozen=True)
class Study:
    """A validated study file."""

    path: Path
    name: str
    baseline: str
    models: dict[str, Model]
    data: Data
    sequence_length: int
    tokens_per_parameter: float
    ratios: tuple[float, ...]
    epochs: tuple[int, ...]
    """how often a run of each ratio reads its unique tokens: D tokens are E times the first D/E"""
    optimizers: dict[str, OptimizerSpace]
    seeds: tuple[int, ...]
    phases: tuple[Phase, ...]
    adopt: float
    """Δ1: a move of the descent must gain more than this"""
    insensitive: float
    """Δ2: one value this close to the optimum in every regime makes a hyperparameter insensitive"""
    equal_effort: bool
    executor: ExecutorSettings
    max_hours: float | None
    max_runs: int | None
    """runs of one optimizer in one regime"""
    flags: dict[str, Any]
    target: tuple[float, tuple[float, ...]]
    """parameters and Chinchilla ratios that fits extrapolate to"""
    cluster: str | None
    """a cluster for which reports work out times"""
    eval_points: int
    checkpoints: int
    evaluation: Evaluation | None = None
    sample: str | None = None
    """what the best runs go on from in the report"""

    def regimes(self) -> tuple[Regime, ...]:
        return tuple(
            Regime(model, ratio, epochs) for model in self.models for ratio in self.ratios for epochs in self.epochs
        )

    @property
    def repeats(self) -> bool:
        """Some regime reads its tokens more than once, so that the others must not."""
        return any(regime.epochs > 1 for phase in self.phases for regime in phase.regimes)

    @property
    def looks(self) -> int:
        """How often the seeds phase may look at its results: with two further seeds, and after each one more."""
        return max(1, len(self.seeds) - 2)

    def tokens(self, regime: Regime) -> float:
        """The token budget of a regime, repeated ones included: ratio · tokens_per_parameter · N."""
        return regime.ratio * self.tokens_per_parameter * self.models[regime.model].non_embedding_parameters
