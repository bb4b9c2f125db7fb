"""`megatron-opt export CHECKPOINT --output DIR`: a checkpoint of any layout as a Hugging Face model."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic


def main(argv: list[str], prog: str) -> int:
    """Export; bad input raises UserError."""
    from megatron_opt.export import averages

    parser = argparse.ArgumentParser(
        prog, description="Write a checkpoint, of any layout, as a Hugging Face model: Llama, Mixtral or GPT-2."
    )
    parser.add_argument("checkpoint", type=Path, help="the --save folder of a run (its newest), or one iter_N in it")
    parser.add_argument("--format", choices=["hf"], default="hf", help="Hugging Face: safetensors and config.json")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is empty or not there")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="in place of the one that the run names")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="ids of the vocabulary without its padding")
    parser.add_argument(
        "--keep-padding",
        action="store_true",
        help="the padded vocabulary as it is, so that probabilities stay the same",
    )
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="of a safetensors file (5)")
    parser.add_argument("--trust-checkpoint", action="store_true", help="read a foreign checkpoint's pickles unchecked")
    averages.add_argument(parser)
    args = parser.parse_args(argv)
    for line in export(
        args.checkpoint, args.output, args.tokenizer, args.vocab_size, args.keep_padding,
        args.max_shard_size, args.trust_checkpoint, args.weights,
    ):  # fmt: skip
        print(line)
    return 0


def export(
    checkpoint: Path,
    output: Path,
    tokenizer: Path | None = None,
    vocabulary: int | None = None,
    keep_padding: bool = False,
    shard_gb: float = 5.0,
    trust: bool = False,
    weights: str | None = None,
) -> list[str]:
    """Write the model into `output`; returns what to say. Raises UserError before anything is written."""
    from megatron_opt.export import families, names, safetensors_files, tokenizer_files
    from megatron_opt.export.reading import Checkpoint
    from megatron_opt.extras import require

    require("safetensors")
    if shard_gb <= 0:
        raise UserError(f"--max-shard-size {shard_gb} must be above 0.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already and not empty; give another folder.")
    source = Checkpoint(checkpoint, trust, weights)
    family = families.family_of(source.args)
    words = tokenizer_files.of_run(source.args, tokenizer)
    padded = int(source.args.padded_vocab_size)
    size = padded if keep_padding else vocabulary or _vocabulary(source.args, words)
    if not 0 < size <= padded:
        raise UserError(f"--vocab-size {size} is not within the {padded} ids of the checkpoint's embedding.")
    if words is not None and size < words.vocab_size:
        raise UserError(f"--vocab-size {size} is below the {words.vocab_size} ids of the tokenizer {words.path}.")
    dtype = str(source.dtype).removeprefix("torch.")
    config = families.config_json(family, source.args, size, dtype, words.eod if words else None)
    tensors = names.to_theirs(family.rows, families.spec_of(source.args), source, size)
    output.mkdir(parents=True, exist_ok=True)
    files = safetensors_files.write(output, tensors, int(shard_gb * 1e9))
    copied = tokenizer_files.copy(words, output) if words else []
    write_atomic(output / "config.json", json.dumps(config, indent=2) + "\n")
    said = [
        f"{source.folder} is {output}: {family.architecture}, {dtype}, {size} ids, {len(files)} file(s) of weights"
        + (f", {', '.join(copied)}" if copied else ", no tokenizer")
    ]
    if size < padded:
        said.append(f"{padded - size} ids that pad the vocabulary are left out; --keep-padding keeps them.")
    if source.averages is not None:
        said.append(
            "the weights are schedule-free's average, which the run evaluates (--weights raw: those of its gradients)."
            if source.averages.leads
            else "the weights are their moving average (--weights ema)."
        )
    return said


def _vocabulary(args: Any, words: Any) -> int:
    if words is not None:
        return int(words.vocab_size)
    return int(getattr(args, "vocab_size", None) or args.padded_vocab_size)
