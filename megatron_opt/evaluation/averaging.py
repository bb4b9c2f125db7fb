"""The mean of a run's last checkpoints' weights, and the loss of weights over indexed text: raw and averaged, by one measure.

Averaging along a run stands in for a lower learning rate (arXiv 1803.05407, 2203.05482), so that it helps most where the schedule
has not ended at zero.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opt.checkpointing import folders
from megatron_opt.data import indexed
from megatron_opt.errors import UserError
from megatron_opt.evaluation.scoring import Request

LOSS = "validation_loss"
"""the name of the loss among tasks"""


def last_folders(newest: Path, count: int) -> list[Path]:
    """The `count` newest checkpoints of a run up to `newest` (one iter_N), the newest first; raises UserError for too few."""
    last = newest.name.removeprefix("iter_")
    iterations = [n for n in folders.iterations(newest.parent) if last.isdigit() and n <= int(last)]
    if len(iterations) < count:
        raise UserError(
            f"--average {count}: {newest.parent} holds {len(iterations)} checkpoints up to {newest.name}; save more often "
            "(--save-interval), keep them (--keep-last 0), or average fewer."
        )
    return [newest.parent / folders.name_of(n) for n in iterations[:count]]


def name_of(newest: str, count: int) -> str:
    """Where the results of a mean stand beside those of its newest checkpoint."""
    return f"{newest} mean of {count}"


def sequences(prefix: str, length: int, count: int, vocabulary: int) -> list[Request]:
    """The first `count` sequences of an indexed dataset, each to be said from its first token on; raises UserError."""
    index = indexed.read_index(prefix)
    tokens = np.asarray(indexed.read_tokens(prefix, index)[: count * length + 1], dtype=np.int32)
    most = (len(tokens) - 1) // length
    if most < 1:
        raise UserError(f"--loss-on {prefix} has {len(tokens)} tokens, less than one sequence of {length}.")
    if tokens.max() >= vocabulary:
        raise UserError(
            f"--loss-on {prefix} has the id {tokens.max()}, which the run's tokenizer of {vocabulary} has not."
        )
    starts = range(0, min(count, most) * length, length)
    return [Request(array("i", tokens[a : a + length]), array("i", tokens[a + 1 : a + length + 1])) for a in starts]


def loss(scorer: Any, requests: Sequence[Request]) -> dict[str, Any]:
    """Mean −log p a token with its standard error over sequences, in the form of a task's results; on rank 0."""
    each = np.array([-answer.loglikelihood / len(r.targets) for answer, r in zip(scorer.score(requests), requests)])
    error = float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else None
    metrics = {"loss": {"value": float(each.mean()), "stderr": error}}
    return {LOSS: {"metrics": metrics, "items": len(each), "num_fewshot": None, "limit": len(each), "version": None}}
