"""What a dataset holds, checked against itself, in words."""

from typing import Any

import numpy as np

from megatron_opt.data.check import check_dataset
from megatron_opt.data.indexed import (
    Index,
    bin_path,
    idx_path,
    read_index,
    read_record,
    read_tokens,
    sidecar_path,
)
from megatron_opt.data.tokenizer import Tokenizer, load_tokenizer
from megatron_opt.errors import UserError

BLOCK = 2**24  # tokens looked at in one go
SHOWN = 600  # characters of a sample


def describe(prefix: str, tokenizer: str | None = None, sample: int = 1, **tiktoken_options: Any) -> str:
    """A report on the dataset `prefix` (.bin or .idx may follow), with `sample` documents spread over it.

    Every token is looked at.
    Raises UserError: files missing, corrupt or empty; another tokenizer than the one given.
    """
    if prefix.endswith((".bin", ".idx")):
        prefix = prefix[:-4]
    model = load_tokenizer(tokenizer, **tiktoken_options) if tokenizer else None
    check_dataset(prefix, None, model.sha256() if model else None)
    index = read_index(prefix)
    tokens = read_tokens(prefix, index)
    lengths, documents = index.lengths, index.documents
    if lengths.min() < 0:
        raise UserError(f"{idx_path(prefix)} is corrupt: it holds a negative length; index the corpus again")
    smallest, largest = _range(tokens)
    if smallest < 0:
        raise UserError(f"{bin_path(prefix)} is corrupt: it holds the token id {smallest}; index the corpus again")
    if model is not None and largest >= model.vocab_size:
        raise UserError(
            f"{bin_path(prefix)} holds the token id {largest}, {tokenizer} has {model.vocab_size} tokens;"
            " give the tokenizer it was written with"
        )
    rows = [
        (
            "documents",
            f"{documents:,}" + ("" if documents == len(lengths) else f" of {len(lengths):,} sequences"),
        ),
        ("tokens", f"{index.tokens:,} of {index.dtype}, {bin_path(prefix).stat().st_size / 1e6:.2f} MB"),
        ("sequence length", f"{lengths.min():,} to {lengths.max():,}, mean {lengths.mean():,.1f}"),
        ("token ids", f"{smallest} to {largest}"),
        ("record", _record(prefix)),
    ]
    if model is not None:
        ended = int((tokens[_ends(index) - 1] == model.eod).sum())
        rows.append(("end of document", f"id {model.eod} closes {ended:,} of {documents:,} documents"))
    text = "\n".join([f"{prefix}", *(f"  {name:<16} {value}" for name, value in rows)])
    return "\n".join([text, *_samples(index, tokens, model, min(sample, documents))])


def _range(tokens: np.ndarray) -> tuple[int, int]:
    blocks = [tokens[start : start + BLOCK] for start in range(0, len(tokens), BLOCK)]
    return min(int(block.min()) for block in blocks), max(int(block.max()) for block in blocks)


def _ends(index: Index) -> np.ndarray:
    """Token number after the last token of each document that has tokens."""
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.bounds]
    return ends[1:][np.diff(ends) > 0]


def _record(prefix: str) -> str:
    path = sidecar_path(prefix)
    return f"{path.name} agrees" if read_record(prefix) else "none (not written by megatron-opt)"


def _samples(index: Index, tokens: np.ndarray, model: Tokenizer | None, count: int) -> list[str]:
    starts = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.bounds]
    parts = []
    for number in range(count):
        document = number * index.documents // count
        ids = tokens[starts[document] : starts[document + 1]].tolist()
        shown = model.decode(ids) if model is not None else " ".join(map(str, ids))
        cut = "" if len(shown) <= SHOWN else " …"
        parts.append(f"\ndocument {document}, {len(ids):,} tokens:\n{shown[:SHOWN]}{cut}")
    return parts
