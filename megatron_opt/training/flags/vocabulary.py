"""One padded vocabulary for all layouts: Megatron pads to its divisor times TP, so that every TP size has another model."""

import math
from typing import Any

from megatron_opt.errors import UserError


def padded(size: int, args: Any, logging_enabled: bool = True) -> int:
    """`size` up to a multiple of --make-vocab-size-divisible-by, whatever the tensor-parallel size."""
    multiple = int(args.make_vocab_size_divisible_by)
    return -(-size // multiple) * multiple


def install() -> None:
    """In place of Megatron's function, which multiplies the divisor by the tensor-parallel size."""
    from megatron.core.tokenizers.utils import build_tokenizer

    build_tokenizer.vocab_size_with_padding = padded


def check(args: Any) -> None:
    """Refuse a padded vocabulary that tensor parallelism cannot cut, or that the tokenizer's ids do not fit into."""
    size, tp = args.padded_vocab_size, args.tensor_model_parallel_size
    if size is None:
        raise UserError("the size of the vocabulary is not known; give --vocab-size or --padded-vocab-size.")
    if size % tp:
        if "padded-vocab-size" in args.given_flags:
            raise UserError(f"--padded-vocab-size {size} is not divisible by --tensor-model-parallel-size {tp}.")
        multiple = math.lcm(args.make_vocab_size_divisible_by, tp)
        raise UserError(
            f"the vocabulary, padded to {size}, is not divisible by --tensor-model-parallel-size {tp}; give "
            f"--make-vocab-size-divisible-by {multiple}, also to the layouts that this one is compared with."
        )
    from megatron.training import get_tokenizer

    needed = int(get_tokenizer().vocab_size)
    if size < needed:
        raise UserError(f"--padded-vocab-size {size} is below the tokenizer's {needed} ids; give at least {needed}.")
