"""What a training job refuses to start on."""

import json

import numpy as np
import pytest

from megatron_opt.data import check
from megatron_opt.data.check import check_dataset, tokenizer_digest
from megatron_opt.data.describe import describe
from megatron_opt.data.index import Options, build_index
from megatron_opt.data.indexed import write_index
from megatron_opt.errors import UserError


@pytest.fixture
def prefix(tmp_path, corpus, model):
    build_index(corpus, str(tmp_path / "data"), Options(str(model)), workers=1)
    return tmp_path / "data"


def write(prefix, tokens, dtype=np.int32):
    prefix.with_suffix(".bin").write_bytes(np.array(tokens, dtype=dtype).tobytes())
    with prefix.with_suffix(".idx").open("wb") as stream:
        write_index(stream, dtype, np.array([len(tokens)] if len(tokens) else [], dtype=np.int32))
    return prefix


def test_accepts_what_fits(prefix, model):
    check_dataset(prefix, 400, tokenizer_digest(model))
    check_dataset(prefix)


def test_another_tokenizer(prefix):
    with pytest.raises(UserError, match="another tokenizer"):
        check_dataset(prefix, 400, "0" * 64)


def test_token_beyond_the_vocabulary(prefix, tmp_path):
    largest = json.loads(prefix.with_suffix(".json").read_text())["max_token_id"]
    check_dataset(prefix, largest + 1)
    with pytest.raises(UserError, match=f"token id {largest}, the vocabulary has {largest} tokens"):
        check_dataset(prefix, largest)
    bare = write(tmp_path / "bare", [0, 7])
    check_dataset(bare, 8, "0" * 64)
    with pytest.raises(UserError, match="token id 7"):
        check_dataset(bare, 7)
    with pytest.raises(UserError, match="negative"):
        check_dataset(write(tmp_path / "bare", [0, -7]), 8)


def test_large_files_are_not_scanned(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "SCAN_BYTES", 4)
    check_dataset(write(tmp_path / "bare", [0, 7]), 7)


def test_empty(tmp_path):
    with pytest.raises(UserError, match="holds no tokens"):
        check_dataset(write(tmp_path / "bare", []), 7)


def test_values_that_are_not_tokens(tmp_path):
    with pytest.raises(UserError, match="float32 values"):
        check_dataset(write(tmp_path / "bare", [0.5], np.float32), 7)


def test_record_of_another_dataset(prefix):
    path = prefix.with_suffix(".json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "tokens": record["tokens"] + 1}))
    with pytest.raises(UserError, match="describes another dataset"):
        check_dataset(prefix, 400)


def test_json_of_somebody_else_is_no_record(tmp_path):
    write(tmp_path / "bare", [0, 7])
    (tmp_path / "bare.json").write_text('{"text": "a corpus"}\n{"text": "of two lines"}\n')
    check_dataset(tmp_path / "bare", 8, "0" * 64)


def test_describe(prefix, model, texts):
    report = describe(f"{prefix}.idx", str(model), sample=2)
    assert f"{len(texts)} of {len(texts)} documents" in report
    assert "document 0, " in report and texts[0][:300] in report
    assert "uint16" in report and "agrees" in report


def test_describe_with_another_tokenizer(prefix, tmp_path, model):
    other = tmp_path / "other.model"
    other.write_bytes(model.read_bytes())
    assert "agrees" in describe(str(prefix), str(other))
    prefix.with_suffix(".json").unlink()
    tokens = np.fromfile(prefix.with_suffix(".bin"), dtype=np.uint16)
    tokens[3] = 4000
    tokens.tofile(prefix.with_suffix(".bin"))
    with pytest.raises(UserError, match="token id 4000"):
        describe(str(prefix), str(model))
    assert "none" in describe(str(prefix))
