"""Tokenizers of three families behind one face; ids and end of document are those that Megatron gives.

| file                           | `--tokenizer-type` of Megatron | end of document                        |
|--------------------------------|--------------------------------|----------------------------------------|
| SentencePiece model            | SentencePieceTokenizer         | the model's eos                        |
| tokenizer.json of Hugging Face | HuggingFaceTokenizer           | eos_token of tokenizer_config.json     |
| JSON list of tiktoken tokens   | TikTokenizer                   | `</s>` = 2 of the added special tokens |
"""

import base64
import binascii
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_opt.data.files import input_sha256, read_json
from megatron_opt.errors import UserError
from megatron_opt.extras import require

# Megatron's TikTokenTokenizer: seven named special tokens, fillers up to their number, then the byte pairs.
TIKTOKEN_SPECIAL = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>"]
SPECIAL_COUNT = 1000
TIKTOKEN_PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": "|".join([
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ]),
}  # fmt: skip


class Tokenizer(ABC):
    """Text to token ids and back; `flags` are what Megatron needs to load the same file."""

    kind: str
    path: Path
    vocab_size: int  # ids are below it
    eod: int  # end of document

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end of document."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""

    @property
    @abstractmethod
    def flags(self) -> list[str]:
        """Flags of a Megatron training job."""

    def sha256(self) -> str:
        """Digest of the tokenizer file."""
        return input_sha256(self.path)

    def summary(self) -> dict[str, Any]:
        """What the record beside a tokenizer says of it."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "eod": self.eod, "sha256": self.sha256()}


class SentencePiece(Tokenizer):
    """A SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        import sentencepiece

        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path} is not a SentencePiece model") from None
        self.vocab_size = self._model.get_piece_size()
        self.eod = self._model.eos_id()
        if self.eod < 0:
            raise UserError(f"{path} has no end-of-sentence piece to end documents with; use another tokenizer")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    @property
    def flags(self) -> list[str]:
        return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(self.path)]


class HuggingFace(Tokenizer):
    """A Hugging Face `tokenizer.json`, with special tokens where its post-processor adds them."""

    kind = "huggingface"
    USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")

    def __init__(self, path: Path, eod_token: str | None = None):
        tokenizers = require("tokenizers")
        self.path = path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self.eod_token = eod_token or self._configured_eod() or self._usual_eod()
        self.eod = self._model.token_to_id(self.eod_token)
        if self.eod is None:
            raise UserError(f"{path} has no token {self.eod_token!r} to end documents with; name another with --eod")
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1

    def _configured_eod(self) -> str | None:
        config = self.path.with_name("tokenizer_config.json")
        token = read_json(config).get("eos_token") if config.exists() else None
        return token.get("content") if isinstance(token, dict) else token

    def _usual_eod(self) -> str:
        for token in self.USUAL_EOD:
            if self._model.token_to_id(token) is not None:
                return token
        raise UserError(
            f"{self.path} does not say which token ends a text;"
            f" take it over with `megatron-opt data tokenizer --from {self.path} --eod TOKEN`"
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    @property
    def flags(self) -> list[str]:
        return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(self.path.parent)]


class TikToken(Tokenizer):
    """Megatron's JSON list of tiktoken tokens; the special tokens come first, so id = their number + rank."""

    kind = "tiktoken"
    eod = TIKTOKEN_SPECIAL.index("</s>")

    def __init__(self, path: Path, pattern: str = "v2", special_tokens: int = SPECIAL_COUNT):
        tiktoken = require("tiktoken")
        self.path, self._pattern, self._special_tokens = path, pattern, special_tokens
        if special_tokens < len(TIKTOKEN_SPECIAL):
            raise UserError(f"--tiktoken-num-special-tokens must be at least {len(TIKTOKEN_SPECIAL)}")
        ranks = {token: special_tokens + rank for rank, token in enumerate(_read_tiktoken_json(path))}
        self.vocab_size = special_tokens + len(ranks)
        fillers = [f"<SPECIAL_{i}>" for i in range(len(TIKTOKEN_SPECIAL), special_tokens)]
        special = {token: i for i, token in enumerate(TIKTOKEN_SPECIAL + fillers)}
        self._model = tiktoken.Encoding(
            path.stem, pat_str=TIKTOKEN_PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    @property
    def flags(self) -> list[str]:
        return [
            "--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(self.path),
            "--vocab-size", str(self.vocab_size), "--tiktoken-pattern", self._pattern,
            "--tiktoken-num-special-tokens", str(self._special_tokens),
        ]  # fmt: skip


def load_tokenizer(
    path: str | Path,
    *,
    eod_token: str | None = None,
    pattern: str = "v2",
    special_tokens: int = SPECIAL_COUNT,
) -> Tokenizer:
    """Load a tokenizer file, or a folder with a tokenizer.json; its family is told from its content.

    `eod_token` matters to a tokenizer.json only, `pattern` and `special_tokens` to a tiktoken list only.
    Raises UserError: missing, unreadable or foreign file; no end-of-document token; a package is missing.
    """
    path = tokenizer_file(path)
    head = _head(path)
    if head.startswith(b"["):
        return TikToken(path, pattern, special_tokens)
    if head.startswith(b"{"):
        return HuggingFace(path, eod_token)
    if is_ranks(path):
        raise UserError(
            f"{path} holds bare tiktoken ranks, which Megatron does not load;"
            f" convert it with `megatron-opt data tokenizer --from {path} --output NAME.json`"
        )
    return SentencePiece(path)


def tokenizer_file(path: str | Path) -> Path:
    """The file that holds the tokenizer: `path`, or the tokenizer.json in the folder `path`."""
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path


def is_ranks(path: Path) -> bool:
    """Whether the file begins as tiktoken ranks do: a base64 token, a space, its rank."""
    first = _head(path).partition(b"\n")[0].split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(first[0], validate=True))
    except (binascii.Error, ValueError):
        return False


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            head = stream.read(512).lstrip()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    if not head:
        raise UserError(f"the tokenizer {path} is empty")
    return head


def _read_tiktoken_json(path: Path) -> list[bytes]:
    """Tokens in the order of their ranks, the 256 single bytes first."""
    try:
        entries = json.loads(path.read_bytes())
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        ranks = [entry["rank"] for entry in entries]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is not a list of rank, token_bytes and token_str") from None
    if ranks != list(range(len(tokens))) or len(set(tokens)) != len(tokens):
        raise UserError(f"{path}: the ranks must be 0, 1, 2, … and no token may occur twice")
    if tokens[:256] != [bytes([i]) for i in range(256)]:
        raise UserError(f"{path}: the first 256 tokens must be the single bytes in order, Megatron asks for it")
    return tokens
