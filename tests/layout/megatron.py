"""Megatron's models on the `meta` device for a test's flags, any rank of any world, in one process."""

import importlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

from megatron_opt import platform

QUIET = (
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 5 --lr 1e-3 --optimizer muon --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --moe-token-dispatcher-type alltoall"
).split()


def arguments(words: str, world: int = 1) -> Any:
    """Validated flags of a model, as a job of `world` ranks has them."""
    return validated([*QUIET, *words.split()], world)


def validated(argv: Sequence[str], world: int) -> Any:
    """A whole command line, parsed and checked as in a job of `world` ranks."""
    platform.activate()
    import megatron.training.arguments as theirs
    from megatron.training.global_vars import destroy_global_vars

    from megatron_opt.training import arguments as ours

    parse_args = theirs.parse_args
    environment = {"WORLD_SIZE": str(world), "RANK": "0", "LOCAL_RANK": "0"}
    try:
        with mock.patch.dict("os.environ", environment):
            return ours.parse(argv)
    finally:
        theirs.parse_args = parse_args
        destroy_global_vars()
        importlib.import_module("megatron.core.num_microbatches_calculator").destroy_num_microbatches_calculator()
