"""Train a SentencePiece BPE on a corpus: lossless, the same bytes at every call."""

import io
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from megatron_opt.data.files import already_done, input_sha256, write_json
from megatron_opt.data.progress import spinner
from megatron_opt.data.read import documents
from megatron_opt.data.tokenizer import SentencePiece, Tokenizer, load_tokenizer
from megatron_opt.errors import UserError
from megatron_opt.files import replacing_output

SAMPLE_BYTES = 200 * 2**20


def train_tokenizer(
    source: Path, vocab_size: int, output: Path, json_key: str = "text", sample_bytes: int = SAMPLE_BYTES,
    force: bool = False,
) -> Tokenizer:  # fmt: skip
    """Train on the documents of `source` (at most about `sample_bytes` of them, picked by their digest).

    Nothing is normalized and no space is added, characters outside the vocabulary are spelled in byte pieces,
    digits stand alone and line ends are pieces of their own, so that decode(encode(text)) == text. Only "▁"
    (U+2581), which SentencePiece keeps for the space, does not come back.
    Raises UserError: unreadable or empty corpus; a vocabulary the corpus cannot fill; unwritable output.
    """
    settings = {
        "source": input_sha256(source),
        "vocab_size": vocab_size,
        "json_key": json_key,
        "sample_bytes": sample_bytes,
    }
    record = output.with_name(output.name + ".json")
    if already_done(record, settings, [output], force):
        return load_tokenizer(output)
    with spinner() as progress:
        progress.add_task(f"training {vocab_size} pieces")
        model = _train(_lines(source, json_key, sample_bytes), source, vocab_size)
    with replacing_output(output) as stream:
        stream.write(model)
    tokenizer = SentencePiece(output)
    files = {output.name: {"bytes": len(model)}}
    write_json(record, {**tokenizer.summary(), "settings": settings, "files": files})
    return tokenizer


def _lines(source: Path, json_key: str, sample_bytes: int) -> Iterator[str]:
    """Lines of the documents, which are all taken or a fraction picked by digest."""
    threshold = min(1.0, sample_bytes / max(source.stat().st_size, 1)) * 2**64
    for document in documents(source, json_key):
        if int.from_bytes(blake2b(document.text.encode(), digest_size=8).digest()) < threshold:
            yield from (line for line in document.text.split("\n") if line)


def _train(lines: Iterator[str], source: Path, vocab_size: int) -> bytes:
    import sentencepiece

    first = next(lines, None)
    if first is None:
        raise UserError(f"{source} holds no text to train a tokenizer on")
    model = io.BytesIO()
    failed: list[Exception] = []

    def sentences() -> Iterator[str]:
        # The trainer replaces what its iterator raises by a message of its own: keep it.
        try:
            yield first
            yield from lines
        except Exception as error:
            failed.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.9999, byte_fallback=True, split_digits=True,
            user_defined_symbols=["\n\n", "\n"],
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, max_sentence_length=2**30, num_threads=1, minloglevel=2,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        )  # fmt: skip
    except (RuntimeError, OSError, ValueError, UserError) as error:
        if failed:
            raise failed[0] from None
        raise UserError(_explain(str(error), source, vocab_size)) from None
    return model.getvalue()


def _explain(message: str, source: Path, vocab_size: int) -> str:
    too_high = re.search(r"value <= (\d+)", message)
    if too_high:
        return f"{source} has too little text for {vocab_size} pieces; give --vocab-size {too_high[1]} or less"
    too_low = re.search(r"required_chars\. \d+ vs (\d+)", message)
    if too_low:
        return f"--vocab-size {vocab_size} does not hold the letters of {source}; give {too_low[1]} or more"
    return f"cannot train a tokenizer of {vocab_size} pieces on {source}: {message.strip()}"
