"""The data flags, resolved once: which datasets with which weights each split is made of, and what cannot be meant."""

import ast
import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError

SPLITS = ("train", "valid", "test")
_JOINT = ("data_path", "data_args_path")
_PER_SPLIT = ("per_split_data_args_path",)
_PATHS = tuple(f"{split}_data_path" for split in SPLITS)


@dataclass(frozen=True)
class Blend:
    """Datasets and their weights, None for "each once, as large as it is"; `flag` is where they were named."""

    flag: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None

    def for_megatron(self) -> tuple[list[str], list[float] | None]:
        """As `get_blend_from_list` of Megatron gives it."""
        return list(self.prefixes), None if self.weights is None else list(self.weights)


@dataclass(frozen=True)
class Sources:
    """Either one blend that --split cuts (`shares`: begin and end of each split, or None), or one of each split; neither: mock."""

    joint: Blend | None = None
    split: str | None = None
    apart: tuple[Blend | None, ...] | None = None

    def shares(self) -> list[tuple[Blend, tuple[float, float]] | None]:
        """Per split: its blend, and from where to where it takes each dataset's sequences; None: no such split."""
        if self.joint is None:
            return [None if blend is None else (blend, (0.0, 1.0)) for blend in self.apart or (None,) * 3]
        from megatron.core.datasets import blended_megatron_dataset_config as megatron

        matrix = megatron.convert_split_vector_to_split_matrix(megatron.parse_and_normalize_split(self.split))
        return [None if share is None else (self.joint, share) for share in matrix]

    def prefixes(self) -> dict[str, str]:
        """Every dataset that is named, once: the flag that names it first."""
        blends = [self.joint] if self.joint else self.apart or ()
        flag_of: dict[str, str] = {}
        for blend in filter(None, blends):
            for prefix in blend.prefixes:
                flag_of.setdefault(prefix, blend.flag)
        return flag_of


def resolve(args: Any) -> Sources:
    """What the data flags name, whichever they are; raises UserError where they contradict each other or mean nothing."""
    named = [name for name in (*_JOINT, *_PER_SPLIT) if getattr(args, name) is not None]
    if any(getattr(args, name) is not None for name in _PATHS):
        named.append(next(name for name in _PATHS if getattr(args, name) is not None))
    if args.mock_data:
        named.append("mock_data")
    if len(named) != 1:
        said = " and ".join(_flag(name) for name in named)
        raise UserError(f"{said} name the data twice; give one of them." if named else _NO_DATA)
    name = named[0]
    if name == "mock_data":
        if args.split is not None:
            raise UserError("--split cuts what --data-path names; leave it out beside --mock-data.")
        return Sources()
    if name in _JOINT:
        words = args.data_path if name == "data_path" else _read(args, name).split()
        split = _split(args.split, _flag(name))
        return Sources(joint=_blend(_flag(name), words), split=split)
    if args.split is not None:
        raise UserError(f"--split cuts what --data-path names; leave it out beside {_flag(name)}.")
    if name == "per_split_data_args_path":
        return Sources(apart=_from_json(_read(args, name), args.per_split_data_args_path))
    return Sources(apart=tuple(_blend(_flag(path), getattr(args, path)) for path in _PATHS))


_NO_DATA = (
    "there is no data: give --train-data-path and --valid-data-path, or --data-path with --split, or --mock-data."
)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(args: Any, name: str) -> str:
    path = getattr(args, name)
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"{_flag(name)} {path} cannot be read: {reason}; give a file that names datasets.") from None


def _split(text: str | None, flag: str) -> str:
    if text is None:
        raise UserError(f"{flag} needs --split TRAIN,VALID,TEST, such as 969,30,1.")
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > len(SPLITS) or not all(re.fullmatch(r"\d+\.?\d*|\.\d+", part) for part in parts):
        raise UserError(
            f"--split {text!r} is not one to three numbers of 0 or more; give TRAIN,VALID,TEST, as 969,30,1."
        )
    if not any(float(part) for part in parts):
        raise UserError(f"--split {text!r} gives nothing to any split; give TRAIN,VALID,TEST, as 969,30,1.")
    return text


def _from_json(text: str, path: str) -> tuple[Blend | None, ...]:
    where = f"--per-split-data-args-path {path}"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON ({error}); give {{"train": […], "valid": […], "test": […]}}.') from None
    if not isinstance(content, dict) or set(content) - set(SPLITS) or not content:
        raise UserError(f'{where}: an object with the keys "train", "valid" and "test" is expected, and no others.')
    blends = []
    for split in SPLITS:
        words = content.get(split)
        if isinstance(words, str):
            words = words.split()
        fits = isinstance(words, list) and all(isinstance(word, (str, int, float)) for word in words)
        if words is not None and not fits:
            raise UserError(f'{where}: "{split}" must be a list of weights and prefixes, or null.')
        blends.append(_blend(f'{where}, "{split}"', None if words is None else [str(word) for word in words]))
    return tuple(blends)


def _blend(flag: str, words: Sequence[str] | None) -> Blend | None:
    """The words of one flag: prefixes alone, or a weight before each."""
    if words is None:
        return None
    words = [word.strip() for word in words]
    if not words or not all(words):
        raise UserError(f"{flag} names no dataset; give its prefix, or leave the flag out.")
    heads = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(head is None for head in heads):
        stray = next((word for word in words if _number(word) is not None and not _is_dataset(word)), None)
        if stray is not None:
            raise UserError(f"{flag}: {stray} reads as a weight, which stands before every dataset or before none.")
        return Blend(flag, tuple(words), None)
    if any(head is None for head in heads):
        raise UserError(f"{flag}: some datasets have a weight and some have none; give every one a weight, or none.")
    weights = [head for head in heads if head is not None]
    for word, prefix, weight in zip(words[::2], words[1::2], weights, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"{flag}: the weight {word} of {prefix} must be above 0 and finite; leave out what is not read."
            )
        if _is_dataset(word):
            raise UserError(f"{flag}: {word} reads as the weight of {prefix}, but {word}.idx is there; write ./{word}.")
    return Blend(flag, tuple(words[1::2]), tuple(weights))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _is_dataset(word: str) -> bool:
    return Path(f"{word}.idx").exists()


# ---- what cannot be trained on


def check(args: Any) -> None:
    """Refuse data that is missing, damaged, foreign or too little, and data flags without effect, before anything is built.

    May set `eval_iters` to 0 where there is nothing to evaluate on and the user did not ask for it.
    """
    from megatron_opt.data.check import check_dataset, tokenizer_digest

    _without_effect(args)
    sources = resolve(args)
    digest = tokenizer_digest(args.tokenizer_model) if args.tokenizer_model else None
    for prefix, flag in sources.prefixes().items():
        try:
            check_dataset(prefix, args.padded_vocab_size, digest)
        except UserError as error:
            raise UserError(f"{flag}: {str(error).removesuffix('.')}.") from error
    if args.mock_data:
        return
    shares = sources.shares()
    if shares[0] is None and not args.skip_train:
        raise UserError("there is no training data: give --train-data-path, or --split a share for it above 0.")
    if shares[1] is None and args.eval_iters:
        asked = [name for name in ("full-validation", "eval-samples", "eval-iters") if name in args.given_flags]
        if asked:
            raise UserError(f"--{asked[0]}: there is no validation data; give --valid-data-path, or leave it out.")
        args.eval_iters = 0
    for split, share in zip(SPLITS, shares, strict=True):
        if share is not None:
            _enough(args, split, *share, sources.split)


def _enough(args: Any, split: str, blend: Blend, share: tuple[float, float], cut: str | None) -> None:
    """Megatron counts epochs without end over a dataset without tokens, and fails late over one that it may read but once."""
    from megatron_opt.data.indexed import read_index

    samples, once = (
        0,
        (blend.weights is None and len(blend.prefixes) > 1) or (split == "valid" and args.whole_validation),
    )
    for prefix in blend.prefixes:
        lengths = read_index(prefix).lengths
        begin, end = (round(edge * len(lengths)) for edge in share)
        tokens = int(lengths[begin:end].sum(dtype="int64"))
        remedy = f"change --split {cut} (0 for a split that is not wanted)" if cut else "index more text"
        if tokens == 0:
            raise UserError(
                f"{blend.flag}: the {split} split gets {end - begin} of the {len(lengths)} documents of {prefix} "
                f"and no token; {remedy}."
            )
        if once and tokens <= args.seq_length:
            raise UserError(
                f"{blend.flag}: the {split} split gets {tokens} tokens of {prefix}, which are read once and give no whole "
                f"sample of --seq-length {args.seq_length}; {remedy}, or give weights, with which datasets are repeated."
            )
        samples += (tokens - 1) // args.seq_length
    if once and samples < _wanted(args, split):
        raise UserError(
            f"{blend.flag}: the {split} datasets hold {samples} samples and are read once, the run needs "
            f"{_wanted(args, split)}; give each a weight, with which they are repeated, or fewer steps."
        )


def _wanted(args: Any, split: str) -> int:
    """Samples that the run asks of a split beyond which it is repeated: none of those that every evaluation reads anew."""
    return (args.train_samples or (args.train_iters or 0) * args.global_batch_size) if split == "train" else 0


def _without_effect(args: Any) -> None:
    if args.reset_position_ids and args.position_embedding_type != "learned_absolute":
        raise UserError(
            f"--reset-position-ids has no effect on --position-embedding-type {args.position_embedding_type}, "
            "whose angles are relative; --reset-attention-mask keeps documents apart."
        )
    if args.reset_attention_mask:
        if args.transformer_impl != "local":
            raise UserError(
                "--reset-attention-mask has no effect on Transformer Engine's causal attention, which looks at no mask; "
                "use --transformer-impl local."
            )
        if args.pipeline_model_parallel_size > 2 or args.virtual_pipeline_model_parallel_size:
            raise UserError(
                "--reset-attention-mask does not reach pipeline stages between the first and the last; use "
                "--pipeline-model-parallel-size 1 or 2, without virtual stages."
            )
        if "no-create-attention-mask-in-dataloader" in args.given_flags:
            raise UserError(
                "--no-create-attention-mask-in-dataloader leaves out the mask of --reset-attention-mask; give one."
            )
        args.create_attention_mask_in_dataloader = True  # left out on CPU where causal attention is all there is


def flags_read() -> frozenset[str]:
    """Names X of every `args.X` that the datasets, the batches and these checks read."""
    from megatron_opt.training import batches

    names = {*_JOINT, *_PER_SPLIT, *_PATHS}
    for module in (batches, inspect.getmodule(flags_read)):
        for node in ast.walk(ast.parse(inspect.getsource(module))):  # type: ignore[arg-type]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
                names.add(node.attr)
    return frozenset(names)
