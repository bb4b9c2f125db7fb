"""What a command line is refused with, found in this process: Megatron is imported once for a whole module of cases."""

import os
from collections.abc import Sequence

from megatron_opt import platform

platform.activate()

import megatron.training.arguments as megatron_arguments  # noqa: E402
from megatron.training import global_vars, training  # noqa: E402

from megatron_opt.errors import UserError  # noqa: E402
from megatron_opt.training import arguments  # noqa: E402

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 "
    "--global-batch-size 2 --train-iters 20 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 127 "
    "--eval-iters 0 --eval-interval 100 --attention-dropout 0 --hidden-dropout 0 --mock-data"
).split()
_PARSE, _MODEL = megatron_arguments.parse_args, training.get_model


def parsed(argv: Sequence[str], ranks: int = 1):
    """The flags of a command line on so many ranks; raises what the job would stop with."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)
    megatron_arguments.parse_args = _PARSE
    global_vars.unset_global_variables()
    try:
        return arguments.parse(list(argv))
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before
        megatron_arguments.parse_args, training.get_model = _PARSE, _MODEL
        global_vars.unset_global_variables()


def refusal(flags: str, ranks: int = 1) -> str:
    """The sentence that a small run is refused with, its flags followed by `flags`; fails where it is accepted."""
    try:
        parsed([*MODEL, *flags.split()], ranks)
    except UserError as error:
        return str(error)
    raise AssertionError(f"accepted: {flags}")
