"""A model's tokenizer beside it: which vocabulary it has, and its files taken along."""

import shutil
from pathlib import Path
from typing import Any

from megatron_opt import run_files
from megatron_opt.errors import UserError

_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip


def of_run(args: Any, given: Path | None) -> Any:
    """The tokenizer of a checkpoint's flags, or `given`; None where ids have no text."""
    from megatron_opt.data.tokenizer import load_tokenizer

    path: Any = given or getattr(args, "tokenizer_model", None)
    if given is None and (not path or getattr(args, "tokenizer_type", None) == "NullTokenizer"):
        return None
    if not Path(path).exists():
        raise UserError(f"the tokenizer {path} is not there; say where it is by --tokenizer FILE.")
    tokenizer = load_tokenizer(
        path,
        pattern=getattr(args, "tiktoken_pattern", None) or "v2",
        special_tokens=getattr(args, "tiktoken_num_special_tokens", None) or 1000,
    )
    fits(tokenizer, args.padded_vocab_size)
    _trained_with(args, tokenizer)
    return tokenizer


def run_folder(args: Any) -> Path | None:
    """The folder of the run whose checkpoint has these flags, where it is on this machine."""
    folder = getattr(args, "output_dir", None)
    return Path(folder) if folder and (Path(folder) / run_files.CONFIG).is_file() else None


def recorded(folder: Path | None) -> dict[str, Any]:
    """What a run's folder tells of its tokenizer: model, vocab_size, sha256; empty where it tells nothing."""
    return (run_files.record(folder).get("tokenizer") or {}) if folder else {}


def _trained_with(args: Any, tokenizer: Any) -> None:
    """Raise UserError where the run tells of a tokenizer with another number of ids; a converted one has as many."""
    known = recorded(run_folder(args))
    if known.get("vocab_size") and known["vocab_size"] != tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the one that the run was trained with "
            f"{known['vocab_size']} ({known.get('model')}); it is the tokenizer of another vocabulary."
        )


def fits(tokenizer: Any, vocabulary: int) -> None:
    """Raise UserError for a tokenizer whose ids the model does not have."""
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model {vocabulary}; "
            "it is the tokenizer of another vocabulary."
        )


def copy(tokenizer: Any, output: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names. A SentencePiece model is called tokenizer.model there."""
    source = Path(tokenizer.path)
    if tokenizer.kind != "huggingface":
        name = "tokenizer.model" if tokenizer.kind == "sentencepiece" else source.name
        shutil.copyfile(source, output / name)
        return [name]
    names = [name for name in _BESIDE if (source.parent / name).is_file()]
    for name in names:
        shutil.copyfile(source.parent / name, output / name)
    return names


def beside(folder: Path, vocabulary: int) -> Any:
    """The tokenizer.json of a Hugging Face folder, else its tokenizer.model, None without; UserError for another vocabulary."""
    there = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not there:
        return None
    from megatron_opt.data.tokenizer import is_ranks, load_tokenizer

    path = folder if there[0] == "tokenizer.json" else folder / there[0]
    if path.is_file() and is_ranks(path):  # tiktoken's, which no flag of Megatron takes
        return None
    tokenizer = load_tokenizer(path)
    fits(tokenizer, vocabulary)
    return tokenizer
