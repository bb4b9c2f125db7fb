"""The tokenizer's flags: a type, and the file, folder or size that this type reads."""

import os
from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.extras import missing

_FILES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer")
_PACKAGES = {
    "HuggingFaceTokenizer": "transformers",
    "GPT2BPETokenizer": "transformers",
    "BertWordPieceLowerCase": "transformers",
    "BertWordPieceCase": "transformers",
    "TikTokenizer": "tiktoken",
    "SentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
}


def check_tokenizer(args: Any) -> None:
    """Refuse a missing type, a missing package, and a model that is not what the type reads."""
    kind, model = args.tokenizer_type, args.tokenizer_model
    if kind is None:
        if args.use_checkpoint_args:
            return
        raise UserError(
            "--tokenizer-type is missing; give it and --tokenizer-model (`megatron-opt data` makes one), or "
            "--tokenizer-type NullTokenizer --vocab-size N for ids without a text."
        )
    if kind == "NullTokenizer":
        if not args.vocab_size:
            raise UserError("--vocab-size is missing; --tokenizer-type NullTokenizer knows no size of its own.")
        return
    package = _PACKAGES.get(kind)
    if package and (lacking := missing(package)):
        raise UserError(f"--tokenizer-type {kind}: {lacking}")
    if (kind in _FILES or kind == "HuggingFaceTokenizer") and not model:
        what = "its folder, or a name on the hub" if kind == "HuggingFaceTokenizer" else "its file"
        raise UserError(f"--tokenizer-model is missing; give {what} for --tokenizer-type {kind}.")
    if kind in _FILES and not os.path.isfile(model):
        there = "is a folder" if os.path.isdir(model) else "is not there"
        raise UserError(f"--tokenizer-model {model} {there}; --tokenizer-type {kind} reads a file.")
    if _PACKAGES.get(kind) == "sentencepiece":
        from sentencepiece import SentencePieceProcessor

        try:
            SentencePieceProcessor(model_file=model)
        except (RuntimeError, OSError, TypeError):
            raise UserError(
                f"--tokenizer-model {model} is no SentencePiece model; --tokenizer-type {kind} reads one."
            ) from None
    if kind == "HuggingFaceTokenizer" and os.path.isfile(model):
        raise UserError(
            f"--tokenizer-model {model} is a file; --tokenizer-type HuggingFaceTokenizer reads the folder that it lies in: "
            f"--tokenizer-model {os.path.dirname(os.path.abspath(model))}."
        )
    if kind == "HuggingFaceTokenizer" and os.path.sep in model and not os.path.exists(model) and model.count("/") != 1:
        raise UserError(f"--tokenizer-model {model} is not there; give the tokenizer's folder.")
