"""`megatron-opt import HF_DIR --output CHECKPOINT`: a Hugging Face model as a checkpoint to start from, on any layout."""

import argparse
import functools
from pathlib import Path
from typing import Any

import yaml

from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # that old versions of transformers stored


def main(argv: list[str], prog: str) -> int:
    """Import; bad input raises UserError."""
    parser = argparse.ArgumentParser(
        prog, description="Make a checkpoint to start from out of a Hugging Face model: Llama, Mixtral or GPT-2."
    )
    parser.add_argument("source", type=Path, metavar="HF_DIR", help="folder with config.json and safetensors files")
    parser.add_argument("--output", type=Path, required=True, metavar="CHECKPOINT", help="what `train --load` gets")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, default=1, metavar="N", help="pad the vocabulary to a multiple (1)"
    )
    args = parser.parse_args(argv)
    for line in import_model(args.source, args.output, args.make_vocab_size_divisible_by):
        print(line)
    return 0


def import_model(source: Path, output: Path, multiple: int = 1) -> list[str]:
    """Write the checkpoint and its model.yaml of flags; returns what to say. Raises UserError before anything is written."""
    from megatron_opt.export import families, names, tokenizer_files, writing
    from megatron_opt.export.configs import Config
    from megatron_opt.export.model import validated
    from megatron_opt.export.safetensors_files import Tensors
    from megatron_opt.extras import require

    require("safetensors")
    if multiple < 1:
        raise UserError(f"--make-vocab-size-divisible-by {multiple} must be 1 or more.")
    config = Config(source)
    tensors = Tensors(source)
    padded = -(-config.vocabulary // multiple) * multiple
    flags = config.flags() | {"padded-vocab-size": padded}
    tokenizer = tokenizer_files.beside(source, config.vocabulary)
    theirs = Source(config, tensors)
    dtype = writing.dtype_of(str(theirs(theirs.embedding).dtype).removeprefix("torch."))
    args = validated(_argv(flags, dtype_is_bf16=str(dtype) == "torch.bfloat16"), padded)
    families.family_of(args)
    spec = families.spec_of(args)
    known = {row.theirs for row in names.expanded(config.family.rows, spec)}
    theirs.check(known)
    weights = dict(names.to_ours(config.family.rows, spec, theirs, dtype))
    folder = writing.write(args, weights.__getitem__, output)
    write_atomic(output / "model.yaml", yaml.safe_dump(flags, sort_keys=False))
    said = [f"{source} is {folder}: {config.family.architecture}, {dtype}, {padded} ids"]
    if padded > config.vocabulary:
        said.append(
            f"{padded - config.vocabulary} ids pad the vocabulary; each has the mean row, a share of the softmax."
        )
    kinds = {"huggingface": "HuggingFaceTokenizer", "sentencepiece": "SentencePieceTokenizer"}
    words = "the tokenizer's flags"
    if tokenizer is not None and tokenizer.kind in kinds:
        path = source if tokenizer.kind == "huggingface" else tokenizer.path
        words = f"--tokenizer-type {kinds[tokenizer.kind]} --tokenizer-model {path}"
    said.append(
        f"Start from it: megatron-opt train --load {output} --use-checkpoint-args --finetune --seq-length N {words} …"
    )
    return said


def _argv(flags: dict[str, Any], dtype_is_bf16: bool) -> list[str]:
    words = [] if not dtype_is_bf16 else ["--bf16"]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*words, "--seq-length", str(flags["max-position-embeddings"])]


class Source:
    """Tensors of the folder under the names of the table: with or without `transformer.`, old buffers left out."""

    def __init__(self, config: Any, tensors: Any):
        """`tensors` gives a tensor by its stored name."""
        self._tensors, self._config = tensors, config
        gpt2 = config.family.model_type == "gpt2"
        bare = gpt2 and not any(name.startswith("transformer.") for name in tensors.names)
        self._stored = {
            f"transformer.{name}" if bare and not name.startswith("lm_head.") else name: name
            for name in tensors.names
            if not name.endswith(_BUFFERS) or (gpt2 and "c_" in name)
        }
        self.embedding = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a fused tensor is asked for once for each of its matrices
    def __call__(self, name: str) -> Any:
        return self._tensors(self._stored.get(name, name))

    def check(self, known: set[str]) -> None:
        """Raise UserError for a tensor that the configuration has no place for."""
        import torch

        extra = sorted(set(self._stored) - known)
        if extra == ["lm_head.weight"]:
            if torch.equal(self("lm_head.weight"), self(self.embedding)):
                return
            raise UserError(f"{self._config.path} ties the embedding to lm_head.weight, and the two are not equal.")
        if extra:
            raise UserError(
                f"{self._config.path} has no place for {extra[0]} ({len(extra)} such tensors); not its weights."
            )
