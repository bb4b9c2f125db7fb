"""A batch that grows during a run: `batch_ramp: "0:2 0.1:4 0.25:8"`, shares of the run's tokens and the batch from there on.

Megatron's `--step-batch-size-schedule` counts tokens and makes the run one of samples; `--rampup-batch-size` has no effect in
Megatron 0.19. A step's tokens grow with its batch, so that tokens are the budget here as everywhere, and steps are what follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_opt.errors import UserError

KEY = "batch_ramp"


@dataclass(frozen=True)
class Ramp:
    """A ramp worked out for one run; every part is a whole number of steps."""

    starts: tuple[int, ...]
    """samples from which each batch holds"""
    batches: tuple[int, ...]
    samples: int
    """of the whole run"""

    @property
    def iterations(self) -> int:
        """Steps of the whole run."""
        ends = (*self.starts[1:], self.samples)
        return sum((end - start) // batch for start, end, batch in zip(self.starts, ends, self.batches))

    def flags(self, sequence: int) -> dict[str, Any]:
        """In place of a batch and a number of steps."""
        schedule = " ".join(f"{start * sequence}:{batch}" for start, batch in zip(self.starts, self.batches))
        return {"train-samples": self.samples, "step-batch-size-schedule": schedule}


def parse(text: Any, final: int) -> list[tuple[float, int]]:
    """(share, batch) of each part; raises UserError, the reason alone, for what is no ramp to a batch of `final`."""
    try:
        parts = [(float(share), int(batch)) for share, batch in (part.split(":") for part in str(text).split())]
    except ValueError:
        raise UserError('it must be shares of the run and batches, such as "0:2 0.1:4 0.25:8"') from None
    shares, batches = [share for share, _ in parts], [batch for _, batch in parts]
    if len(parts) < 2 or shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1:
        raise UserError('its shares must begin at 0 and grow, all below 1, such as "0:2 0.1:4 0.25:8"')
    if batches[0] < 1 or batches != sorted(set(batches)) or any(final % batch for batch in batches):
        raise UserError(f"its batches must grow and divide `batch_size: {final}`")
    if batches[-1] != final:
        raise UserError(f"it ends at a batch of {batches[-1]}, not at `batch_size: {final}`")
    return parts


def ramp_of(text: Any, final: int, samples: int) -> Ramp:
    """The ramp of a run of at most `samples`, a multiple of the final batch."""
    starts: list[int] = [0]
    batches: list[int] = []
    for share, batch in parse(text, final):
        if batches:
            steps = max(1, round((share * samples - starts[-1]) / batches[-1]))
            starts.append(starts[-1] + steps * batches[-1])
        batches.append(batch)
    left = max(1, (samples - starts[-1]) // final) * final
    return Ramp(tuple(starts), tuple(batches), starts[-1] + left)
