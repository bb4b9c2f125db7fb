"""What happens between the weights of a step and their publication, with every matrix of the model in sight.

A rule sees one matrix; what needs two, or all (QK-clip, an average of weights), is a `PostStep`. The optimizer runs its list
in order; main copies that one of them has changed are published whatever the kernels have written already.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_opt.distributed.param_shards import ParamShard


@dataclass(frozen=True)
class Report:
    """What is logged of the steps since the last report: a line, a row's entry and series by name."""

    key: str
    line: str
    entry: dict[str, Any]
    series: dict[str, float] = field(default_factory=dict)


class PostStep(Protocol):
    """One of them; every rank calls every method in turn."""

    def begin(self) -> None:
        """Before the forward passes of a step."""

    def prepare(self) -> None:
        """With the gradients there and the weights still old: what must travel may set out."""

    def run(self, step: int) -> Collection[ParamShard]:
        """With the new weights in the main copies: change some; the parameter shards whose main copy has changed."""

    def report(self) -> Report | None:
        """What to log; forgets it."""
