"""The .bin/.idx format, against Megatron's own builder and reader."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_opt.data.indexed import bin_path, idx_path, read_index, read_tokens, token_dtype, write_index
from megatron_opt.errors import UserError
from megatron_opt.files import replacing_output

documents = st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=9), min_size=1, max_size=12)
once = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_ours(prefix, docs, dtype):
    with replacing_output(bin_path(prefix)) as stream:
        stream.write(np.concatenate(docs).astype(dtype).tobytes())
    with replacing_output(idx_path(prefix)) as stream:
        write_index(stream, dtype, np.array([len(doc) for doc in docs], dtype=np.int32))


def write_megatrons(prefix, docs, dtype):
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for doc in docs:
        builder.add_document(doc, [len(doc)])
    builder.finalize(str(idx_path(prefix)))


@once
@given(documents, st.sampled_from([np.uint16, np.int32]))
def test_same_bytes_as_megatrons_builder(tmp_path, docs, dtype):
    write_ours(tmp_path / "ours", docs, dtype)
    write_megatrons(tmp_path / "theirs", docs, dtype)
    assert bin_path(tmp_path / "ours").read_bytes() == bin_path(tmp_path / "theirs").read_bytes()
    assert idx_path(tmp_path / "ours").read_bytes() == idx_path(tmp_path / "theirs").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [list(sequence) for sequence in read] == docs


@once
@given(st.lists(documents, min_size=1, max_size=5), st.booleans())
def test_reads_what_megatron_writes(tmp_path, docs, multimodal):
    prefix = tmp_path / "theirs"
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.int32, multimodal=multimodal)
    for doc in docs:
        builder.add_document(np.concatenate(doc), [len(part) for part in doc], [1] * len(doc))
    builder.finalize(str(idx_path(prefix)))
    index = read_index(prefix)
    assert index.documents == len(docs)
    assert index.lengths.tolist() == [len(part) for doc in docs for part in doc]
    assert read_tokens(prefix, index).tolist() == [token for doc in docs for part in doc for token in part]


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 10**6])
def test_dtype_is_megatrons_choice(vocab_size):
    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


@pytest.fixture
def prefix(tmp_path):
    write_ours(tmp_path / "data", [[1, 2, 3], [4], [5, 6]], np.uint16)
    return tmp_path / "data"


def test_every_truncation_is_seen(prefix):
    whole = idx_path(prefix).read_bytes()
    for size in range(len(whole)):
        idx_path(prefix).write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"truncated|magic"):
            read_index(prefix)
    tokens = bin_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(whole)
    for size in range(len(tokens)):
        bin_path(prefix).write_bytes(tokens[:size])
        with pytest.raises(UserError, match=r"data\.bin is truncated"):
            read_index(prefix)


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (0, b"PK\x03\x04", "wrong magic"),
        (9, struct.pack("<Q", 2), "format version 2"),
        (17, b"\x63", "dtype code 99"),
        (18, struct.pack("<Q", 2**60), "truncated"),
        (18, struct.pack("<Q", 1), "corrupt"),
        (34 + 3 * 12 + 3 * 8, struct.pack("<Q", 2), "do not cover"),
        (34 + 2 * 4, struct.pack("<i", 1), "different datasets"),
    ],
)
def test_foreign_and_corrupt(prefix, offset, value, says):
    data = bytearray(idx_path(prefix).read_bytes())
    data[offset : offset + len(value)] = value
    idx_path(prefix).write_bytes(data)
    with pytest.raises(UserError, match=says):
        read_index(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_is_named(prefix, suffix):
    prefix.with_suffix(suffix).unlink()
    with pytest.raises(UserError, match=rf"data\{suffix} does not exist"):
        read_index(prefix)
    with pytest.raises(UserError, match="as a prefix"):
        read_index(f"{prefix}{suffix}")
