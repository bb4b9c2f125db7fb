"""Quantities of a whole run, over all its processes: carried by each line of metrics.jsonl, resumed from the last one."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """What a run has come to. Times are of timed steps that count: not those that a kill made void."""

    first_loss: float | None = None
    last_loss: float | None = None  # of the newest step whose loss is finite
    grad_norm: float | None = None
    steps: int = 0  # timed
    seconds: float = 0.0  # of the timed steps
    tokens: int = 0  # of the timed steps
    flops: float = 0.0  # of the timed steps
    wall: float = 0.0  # of all processes, set-up and evaluation included
    bad: int = 0  # log intervals in a row with a loss that is not finite
    spans: dict[str, float] = field(default_factory=dict)  # parts of `seconds`

    def take_loss(self, loss: float | None, grad_norm: float | None) -> None:
        """After a step."""
        self.grad_norm = grad_norm
        if loss is None:
            return
        self.first_loss = loss if self.first_loss is None else self.first_loss
        if math.isfinite(loss):
            self.last_loss = loss

    def take_time(self, steps: int, seconds: float, tokens: int, flops: float, spans: dict[str, float]) -> None:
        """After a log interval: all of its steps together."""
        self.steps += steps
        self.seconds += seconds
        self.tokens += tokens
        self.flops += flops
        for name, value in spans.items():
            self.spans[name] = self.spans.get(name, 0.0) + value

    def as_row(self) -> dict[str, Any]:
        """For a line of the log; JSON has no NaN, so numbers that are none are left out."""
        row = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}

    @classmethod
    def of_rows(cls, rows: list[dict[str, Any]]) -> "Progress":
        """From the training lines that a resumed run has behind it."""
        if not rows:
            return cls()
        known = {item.name for item in fields(cls)}
        kept = {key: value for key, value in (rows[-1].get("run") or {}).items() if key in known}
        progress = cls(**kept)
        losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float))]
        if progress.first_loss is None and losses:  # a log of an older version
            progress.first_loss = losses[0]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if progress.last_loss is None and finite:
            progress.last_loss = finite[-1]
        return progress

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def flops_per_s(self) -> float | None:
        return self.flops / self.seconds if self.seconds else None

    def train_time(self, tokens: int) -> float:
        """Seconds of all `tokens`; steps between a line and the checkpoint after it were not timed: as the others."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0

    def step_time(self) -> dict[str, float]:
        """Mean seconds a step, whole and by part."""
        return {name: value / max(self.steps, 1) for name, value in {"total": self.seconds, **self.spans}.items()}

    def diverged(self, final: float | None) -> bool:
        """Judged on the run: it has ended no lower than it began, or nothing moves any more."""
        worse = final is not None and self.first_loss is not None and not final < self.first_loss
        dead = self.grad_norm is not None and not 0 < self.grad_norm < math.inf
        return worse or dead
