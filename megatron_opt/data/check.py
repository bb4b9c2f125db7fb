"""What a job asks of a dataset before it starts: header, sizes and the record beside it."""

from pathlib import Path

from megatron_opt.data.files import input_sha256
from megatron_opt.data.indexed import bin_path, read_index, read_record, read_tokens, sidecar_path
from megatron_opt.errors import UserError

SCAN_BYTES = 64 * 2**20  # without a record, files up to this size are scanned for their largest token id


def tokenizer_digest(path: str | Path) -> str:
    """SHA-256 of a tokenizer as the records have it: of the file, or of tokenizer.json in a folder."""
    path = Path(path)
    return input_sha256(path / "tokenizer.json" if path.is_dir() else path)


def check_dataset(prefix: str | Path, vocab_size: int | None = None, tokenizer_sha256: str | None = None) -> None:
    """Refuse a dataset that a model with `vocab_size` embeddings and this tokenizer cannot be trained on.

    A dataset of Megatron's own tool has no record beside it: then the tokenizer is not compared, and token
    ids are only checked in files up to SCAN_BYTES.

    Raises UserError: a file is missing, truncated, foreign or empty; the record is of other files; the
    tokenizer is not the one that wrote the tokens; a token id does not fit the vocabulary.
    """
    index = read_index(prefix)
    tokens = index.tokens
    if tokens == 0:
        raise UserError(f"the dataset {prefix} holds no tokens; index a corpus that is not empty")
    if index.dtype.kind == "f":
        raise UserError(f"the dataset {prefix} holds {index.dtype} values, not token ids; index the corpus again")
    record = read_record(prefix)
    largest = None
    if record is not None:
        if record.get("tokens") != tokens or record.get("documents") != index.documents:
            raise UserError(
                f"{sidecar_path(prefix)} describes another dataset than {prefix}.bin; index the corpus again,"
                " or delete the record if the dataset is right"
            )
        written_by = record.get("tokenizer_sha256")
        if tokenizer_sha256 is not None and written_by is not None and written_by != tokenizer_sha256:
            raise UserError(
                f"the dataset {prefix} was written with another tokenizer ({written_by[:12]}… by sha256)"
                f" than this one ({tokenizer_sha256[:12]}…);"
                f" use {' '.join(record.get('megatron_flags') or [str(record.get('tokenizer'))])}, or index again"
            )
        largest = record.get("max_token_id")
    elif vocab_size is not None and bin_path(prefix).stat().st_size <= SCAN_BYTES:
        values = read_tokens(prefix, index)
        largest = int(values.max())
        if index.dtype.kind == "i" and int(values.min()) < 0:
            raise UserError(f"the dataset {prefix} holds negative token ids; index the corpus again")
    if vocab_size is not None and largest is not None and largest >= vocab_size:
        raise UserError(
            f"the dataset {prefix} holds the token id {largest}, the vocabulary has {vocab_size} tokens;"
            " give the tokenizer it was written with"
        )
