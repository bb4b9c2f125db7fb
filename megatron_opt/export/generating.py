"""`megatron-opt generate CHECKPOINT --prompt TEXT`: a look at what a model has learned, on CPU, through our own forward."""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError, number


def main(argv: list[str], prog: str) -> int:
    """Continue a prompt; bad input raises UserError."""
    from megatron_opt.export import averages

    parser = argparse.ArgumentParser(prog, description="Continue a text with a checkpoint's model, on CPU.")
    parser.add_argument("checkpoint", type=Path, help="the --save folder of a run (its newest), or one iter_N in it")
    parser.add_argument(
        "--prompt", required=True, help="the text to continue; token ids where the run has no tokenizer"
    )
    parser.add_argument(
        "--max-new-tokens", type=number(1, 1e6, whole=True), default=64, metavar="N", help="at most so many tokens (64)"
    )
    parser.add_argument(
        "--temperature", type=number(0, 1e6), default=1.0, metavar="T", help="of the softmax (1); 0 takes the likeliest"
    )
    parser.add_argument(
        "--top-p",
        type=number(0, 1, above=True),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of mass P (1)",
    )
    parser.add_argument("--seed", type=number(0, 2**63 - 1, whole=True), default=0, help="of the samples (0)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="in place of the one that the run names")
    parser.add_argument("--trust-checkpoint", action="store_true", help="read a foreign checkpoint's pickles unchecked")
    averages.add_argument(parser)
    args = parser.parse_args(argv)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model is small and on CPU, whatever the machine has
    print(generate(args))
    return 0


def generate(args: argparse.Namespace) -> str:
    """The prompt and its continuation, as text or ids."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} must be 1 or more.")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must not be below 0, and --top-p must be above 0 and at most 1.")
    from megatron_opt import platform

    platform.activate()
    from megatron_opt.export import model, tokenizer_files
    from megatron_opt.export.kv_cache import Reader
    from megatron_opt.export.reading import Checkpoint

    source = Checkpoint(args.checkpoint, args.trust_checkpoint, args.weights)
    words = tokenizer_files.of_run(source.args, args.tokenizer)
    ids = words.encode(args.prompt) if words else _ids(args.prompt, source.args.padded_vocab_size)
    if not ids:
        raise UserError("--prompt is empty; give a text.")
    flags = model.of_checkpoint(source.args)
    limit = flags.max_position_embeddings if flags.position_embedding_type == "learned_absolute" else None
    if limit and len(ids) + args.max_new_tokens > limit:
        raise UserError(
            f"--prompt has {len(ids)} tokens, and with --max-new-tokens {args.max_new_tokens} passes the model's {limit} positions."
        )
    size = int(words.vocab_size if words else source.args.padded_vocab_size)
    with model.one_process():
        read = Reader(partial(model.logits, model.build(flags, source)), flags, 1, len(ids) + args.max_new_tokens)
        new = sample(
            read, ids, args.max_new_tokens, args.temperature, args.top_p, args.seed,
            size, words.eod if words else None,
        )  # fmt: skip
        for one in new:
            ids.append(one)
    return words.decode(ids) if words else " ".join(map(str, ids))


def _ids(prompt: str, vocabulary: int) -> list[int]:
    try:
        ids = [int(word) for word in prompt.split()]
    except ValueError:
        raise UserError("--prompt: the run has no tokenizer; give ids, or the tokenizer by --tokenizer FILE.") from None
    if not all(0 <= one < vocabulary for one in ids):
        raise UserError(f"--prompt: ids are from 0 to {vocabulary - 1}.")
    return ids


def sample(
    read: Callable[[Any], Any],
    ids: list[int],
    most: int,
    temperature: float,
    top_p: float,
    seed: int,
    vocabulary: int,
    end: int | None,
) -> Iterator[int]:
    """Tokens one by one until `end`, by the logits of what `read` is given next.

    softmax(z/T) over the smallest set of likeliest tokens whose mass reaches p (arXiv 1904.09751); T = 0 takes the likeliest.
    Padding of the vocabulary is never drawn.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    now = torch.tensor([ids])
    for _ in range(most):
        last = read(now)[0, -1, :vocabulary].double()
        if temperature == 0:
            token = int(last.argmax())
        else:
            chances, order = torch.softmax(last / temperature, 0).sort(descending=True, stable=True)
            before = chances.cumsum(0) - chances
            kept = chances * (before < top_p)
            token = int(order[torch.multinomial(kept, 1, generator=generator)])
        if token == end:
            return
        yield token
        now = torch.tensor([[token]])
