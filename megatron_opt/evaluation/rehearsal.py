"""Tasks without a model: what one of so many positions could not answer is said before any is trained."""

import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from megatron_opt.data.tokenizer import Tokenizer
from megatron_opt.evaluation import cli, tasks
from megatron_opt.evaluation.scoring import Answer, Prompt, Request


class _Silent:
    """A `Scorer`'s face that computes nothing."""

    def __init__(self, words: Tokenizer, positions: int):
        self.words, self.max_length = words, positions

    def score(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer(-1.0, False) for _ in requests]

    def continue_(self, prompts: Sequence[Prompt]) -> list[array]:
        return [array("i") for _ in prompts]


def rehearse(
    names: Sequence[str], folder: Path | None, shots: int | None, limit: int | None, words: Tokenizer, positions: int
) -> None:
    """Build every request of the tasks (`names`, `folder`, `shots`: of `tasks.load`) for a model of `positions`.

    Raises UserError as the evaluation of a checkpoint would.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # before the harness imports tqdm
    cli.import_harness()
    cli.run(_Silent(words, positions), tasks.load(names, folder, shots), limit)
