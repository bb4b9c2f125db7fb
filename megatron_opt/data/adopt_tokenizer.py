"""Take over an existing tokenizer: try it on a text, and write it in the form that Megatron loads."""

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_opt.data.files import already_done, input_sha256, read_json, write_json
from megatron_opt.data.tokenizer import (
    HuggingFace,
    TikToken,
    Tokenizer,
    is_ranks,
    load_tokenizer,
    tokenizer_file,
)
from megatron_opt.errors import UserError
from megatron_opt.files import replacing_output

PROBE = "The year 1905; naïve café, 你好.\n\n\tif x != 0:\n        return"


def adopt_tokenizer(
    source: Path, output: Path, eod_token: str | None = None, force: bool = False, **tiktoken_options: Any
) -> Tokenizer:
    """Copy or convert the tokenizer `source` to `output`, after trying it on a probe text.

    SentencePiece models and Megatron's tiktoken lists are copied. A tokenizer.json keeps its name and gets a
    tokenizer_config.json beside it, from which Megatron takes the end-of-text token. Bare tiktoken ranks
    become the list of Megatron's TikTokenizer: the 256 bytes come first, in order, which no merge depends on.
    Raises UserError: unreadable, foreign or unusable tokenizer; an output name that Megatron does not take.
    """
    source = tokenizer_file(source)
    settings = {"adopted": input_sha256(source), "eod_token": eod_token, **tiktoken_options}
    record = output.with_name(output.name + ".json")
    if already_done(record, settings, [output], force) is not None:
        return load_tokenizer(output, **tiktoken_options)
    data = source.read_bytes()
    if is_ranks(source):
        data = _megatron_list(source)
        with tempfile.TemporaryDirectory() as folder:
            trial = Path(folder) / output.name
            trial.write_bytes(data)
            model = load_tokenizer(trial, **tiktoken_options)
    else:
        model = load_tokenizer(source, eod_token=eod_token, **tiktoken_options)
    if eod_token is not None and not isinstance(model, HuggingFace):
        raise UserError(f"--eod {eod_token}: {source} says itself what ends a document ({model.kind}); leave --eod out")
    _check(model, source, output)
    with replacing_output(output) as stream:
        stream.write(data)
    if isinstance(model, HuggingFace):
        write_json(output.with_name("tokenizer_config.json"), _config(source, model))
    tokenizer = load_tokenizer(output, **tiktoken_options)
    files = {output.name: {"bytes": len(data)}}
    write_json(record, {**tokenizer.summary(), "settings": settings, "files": files})
    return tokenizer


def _config(source: Path, model: HuggingFace) -> dict[str, Any]:
    beside = source.with_name("tokenizer_config.json")
    known = read_json(beside) if beside.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {**known, "eos_token": model.eod_token}


def _check(model: Tokenizer, source: Path, output: Path) -> None:
    if isinstance(model, HuggingFace) and output.name != "tokenizer.json":
        raise UserError(f"Megatron finds this tokenizer by its folder; name the output {output.parent}/tokenizer.json")
    if isinstance(model, TikToken) and output.suffix != ".json":
        raise UserError(f"Megatron takes tiktoken files that end in .json; name the output {output.stem}.json")
    ids = model.encode(PROBE)
    if not ids or not all(0 <= i < model.vocab_size for i in (*ids, model.eod)):
        raise UserError(f"the tokenizer {source} does not give ids below its vocabulary of {model.vocab_size} tokens")


def _megatron_list(source: Path) -> bytes:
    """Bare ranks (`base64 rank` a line) as the JSON list that Megatron reads, the single bytes first."""
    tokens: list[bytes] = []
    for number, line in enumerate(source.read_bytes().splitlines(), 1):
        try:
            word, rank = line.split()
            tokens.append(base64.b64decode(word, validate=True))
            in_order = int(rank) == number - 1
        except ValueError:
            raise UserError(f"{source}, line {number}: a base64 token and its rank are expected") from None
        if not in_order:
            raise UserError(f"{source}, line {number}: rank {number - 1} is expected, not {int(rank)}")
    single = [bytes([i]) for i in range(256)]
    if set(tokens[:256]) != set(single):
        raise UserError(f"{source} does not begin with the 256 single bytes; Megatron cannot take it")
    entries = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate(single + tokens[256:])
    ]
    return json.dumps(entries).encode()
