"""Validated flags of models, as jobs of any size have them, in one process."""

from typing import Any

QUIET = (
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 5 --lr 1e-3 --optimizer muon --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --eval-iters 0"
).split()


def arguments(words: str, world: int = 1) -> Any:
    """Flags of a model in a job of `world` ranks; importing this costs nothing, calling it imports Megatron."""
    from tests.training.refusing import parsed

    return parsed([*QUIET, *words.split()], world)
