"""The engine's options, once: flags of a job, of a plan without ranks and of the cost model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.optimizers.options import OptionError, check, choice, decay, option

MODES = ("auto", "owner", "group", "sharded")
MEGATRONS = ("optimizer_cpu_offload", "optimizer_offload_fraction")  # flags that Megatron has
INSTANCES = ("auto", "across", "within")


@dataclass(frozen=True)
class EngineOptions:
    """How matrices are laid out over ranks and travel; each field is a flag."""

    on_bad_matrix: str = choice(
        "skip",
        ("skip", "abort"),
        "a matrix whose gradient is not finite: leave it as it is for this step and count it, or stop",
    )
    matrix_mode: str = choice(
        "auto",
        MODES,
        "compute matrices whole on one rank, cut where a rank is full, or in shards on all; auto picks by balance",
    )
    matrix_balance: float = option(
        1.1, "load and state of the fullest rank over the mean that --matrix-mode auto is content with: more cuts less"
    )
    matrix_instances: str = choice(
        "auto",
        INSTANCES,
        "with --num-distributed-optimizer-instances above 1: each matrix has its owner among the ranks of all instances, or "
        "one within each, which computes it again and sends nothing to others; auto picks by cost",
    )
    exchange_dtype: str = choice(
        "fp32", ("fp32", "bf16"), "type in which gradients and updates travel between shards and owners"
    )
    exchange_bucket_mb: float = option(
        64.0, "matrices travel in buckets of this many megabytes a rank; the next one while this is computed"
    )
    optimizer_cpu_offload: bool = option(False, "state rests in host memory, and is on the device while it is stepped")
    optimizer_offload_fraction: float = option(1.0, "share of the state that --optimizer-cpu-offload is about")
    decay_mode: str = choice(
        "decoupled",
        ("decoupled", "independent", "cautious"),
        "weight decay: times lr, not times lr, or only where the update shrinks the weight",
    )
    split_heads: bool = option(False, "one logical matrix a head for q, k and v")
    ema_decay: float = decay(
        0.0,
        "keep a moving average of the weights, D·average + (1 − D)·weights after each step, and evaluate it too; 0: none",
    )

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def of(flags: Mapping[str, Any]) -> "EngineOptions":
        """From flags by their destinations (`matrix_mode`), defaults where there are none; UserError for no such value."""
        names = (item.name for item in fields(EngineOptions))
        try:
            return EngineOptions(**{name: flags[name] for name in names if flags.get(name) is not None})
        except OptionError as error:
            raise UserError(f"--{error.field.replace('_', '-')} {error.why}") from error

    @property
    def bucket_bytes(self) -> float:
        """Bytes of a bucket."""
        return self.exchange_bucket_mb * 2**20

    @property
    def offloaded(self) -> float:
        """Share of the state that rests in host memory."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0

    @property
    def communication_dtype(self) -> Any:
        """In which gradients and updates travel."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.exchange_dtype]


def add_arguments(group: Any) -> None:
    """A flag for each field that is none of Megatron's."""
    for item in fields(EngineOptions):
        flag, text = f"--{item.name}".replace("_", "-"), item.metadata["help"]
        if item.name in MEGATRONS:
            continue
        if isinstance(item.default, bool):
            group.add_argument(flag, action="store_true", help=text)
        else:
            kind: Any = type(item.default)
            group.add_argument(flag, type=kind, choices=item.metadata.get("choices"), default=item.default, help=text)
