"""Matrices whose gradient cannot be used: left as they are for the step, counted, named in the log."""

import logging
from dataclasses import dataclass, field

from megatron_opt.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class Health:
    """Counts of skipped steps by logical matrix; `policy` is `skip` or `abort`."""

    policy: str = "skip"
    skipped: dict[str, int] = field(default_factory=dict)

    def report(self, bad: set[str], step: int, is_logging_rank: bool) -> None:
        """Count matrices with a non-finite gradient; every rank of the shard group calls this with the same set."""
        for name in sorted(bad):
            self.skipped[name] = self.skipped.get(name, 0) + 1
            if is_logging_rank:
                logger.warning(
                    "step %d: gradient of %s is not finite, skipped (%d so far)", step, name, self.skipped[name]
                )
        if bad and self.policy == "abort":
            raise UserError(
                f"step {step}: the gradient of {sorted(bad)[0]} is not finite ({len(bad)} matrices in all); "
                "resume from the last checkpoint with a lower --lr, or use --on-bad-matrix skip."
            )
