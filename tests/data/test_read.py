"""User text in all its forms, and what is said of bad text."""

import gzip
import json

import pyarrow as pa
import pytest
import zstandard
from made_up import write_jsonl
from pyarrow import parquet

from megatron_opt.data.read import documents, find_files
from megatron_opt.errors import UserError

TEXTS = ["first\nof two lines", "zweites, größer", "", "4th"]
BIG = [f"document {i} " * 3000 for i in range(40)]


def read(path, key="text"):
    return [document.text for document in documents(path, key)]


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_jsonl(tmp_path):
    assert read(write_jsonl(tmp_path / "a.jsonl", TEXTS, key="body"), "body") == TEXTS
    origins = [document.origin for document in documents(tmp_path / "a.jsonl", "body")]
    assert origins == [f"{tmp_path / 'a.jsonl'}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("texts", [TEXTS, BIG])
def test_compressed_jsonl(tmp_path, texts):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts)))
    assert read(tmp_path / "a.jsonl.gz") == read(tmp_path / "a.jsonl.zst") == texts


def test_several_frames_in_one_file(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl(TEXTS)) + zstandard.compress(jsonl(BIG)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)) + gzip.compress(jsonl(BIG)))
    assert read(tmp_path / "a.jsonl.zst") == read(tmp_path / "a.jsonl.gz") == TEXTS + BIG


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_truncated_and_damaged_compression(tmp_path, suffix, share):
    data = gzip.compress(jsonl(BIG)) if suffix == "gz" else zstandard.compress(jsonl(BIG))
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=rf"cannot read .*a\.jsonl\.{suffix}"):
        read(path)
    path.write_bytes(b"not compressed at all")
    with pytest.raises(UserError, match="cannot read"):
        read(path)


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\nand lines\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"# title\n"))
    assert read(tmp_path / "a.txt") == ["with a mark\r\nand lines\n"]
    assert read(tmp_path / "b.md.gz") == ["# title\n"]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": TEXTS, "id": [1, 2, 3, 4]}), path)
    assert read(path, "body") == TEXTS
    with pytest.raises(UserError, match="no column 'text', there are body, id"):
        read(path)
    with pytest.raises(UserError, match="row 1: 'id' holds int"):
        read(path, "id")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        read(path, "body")


def test_undecodable_text_is_located(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\nol\xe9\n")
    with pytest.raises(UserError, match=r"a\.txt, line 3: byte 12 is not UTF-8"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "ol\xe9"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: byte 12 is not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_deeply_nested_json(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000)
    with pytest.raises(UserError, match="line 1: malformed JSON"):
        read(tmp_path / "a.jsonl")


def test_files_of_folders_and_globs(tmp_path):
    for name in (
        "b.txt",
        "a.jsonl",
        "sub/c.md",
        "sub/d.parquet",
        "sub/e.rst.gz",
        "image.png",
        "sub/deep/f.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*inputs):
        return [str(path.relative_to(tmp_path)) for path in find_files([str(tmp_path / name) for name in inputs])]

    assert names("") == ["a.jsonl", "b.txt", "sub/c.md", "sub/d.parquet", "sub/deep/f.txt", "sub/e.rst.gz"]
    assert names("b.txt", "*.txt", "sub/*.md") == ["b.txt", "sub/c.md"]
    assert names("**/*.txt") == ["b.txt", "sub/deep/f.txt"]
    assert names("image.png") == ["image.png"]
    with pytest.raises(UserError, match=r"no file matches .*\.csv"):
        names("*.csv")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no text file"):
        names("none")
