"""The same files as Megatron's own tool writes, by any number of workers, after any interruption."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from made_up import sentences, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

from megatron_opt.data import index as index_module
from megatron_opt.data.index import Options, build_index
from megatron_opt.errors import UserError

SLOW_RUN = """
import sys
import megatron_opt.data.index as index
from megatron_opt.errors import UserError
if __name__ == "__main__":
    index.CHUNK_BYTES = 20_000
    try:
        index.build_index(index.Path(sys.argv[1]), sys.argv[2], index.Options(sys.argv[3]), workers=2)
    except UserError as error:
        sys.exit(str(error))
"""


INTERRUPTED_RUN = """
import sys
import megatron_opt.data.index as index
from megatron_opt.data.cli import main
if __name__ == "__main__":
    index.CHUNK_BYTES = 20_000
    sys.exit(main(sys.argv[1:], "megatron-opt data"))
"""


def files(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize("append_eod", [True, False])
def test_same_files_as_megatrons_tool(tmp_path, corpus, model, append_eod):
    record = build_index(corpus, str(tmp_path / "ours"), Options(str(model), append_eod=append_eod), workers=1)
    tokenizer = SentencePieceTokenizer(str(model))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for line in corpus.read_text().splitlines():
        ids = tokenizer.text_to_ids(json.loads(line)["text"])
        ids = [*ids, tokenizer.eos_id] if append_eod else ids
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    read = IndexedDataset(str(tmp_path / "ours"))
    assert record["tokens"] == sum(map(len, read)) and record["documents"] == len(read)
    assert record["max_token_id"] == max(int(sequence.max()) for sequence in read)
    assert record["text_bytes"] == sum(len(json.loads(line)["text"].encode()) for line in corpus.open())


def test_workers_and_chunks_change_nothing(tmp_path, corpus, model, monkeypatch):
    whole = build_index(corpus, str(tmp_path / "whole"), Options(str(model)), workers=1)
    monkeypatch.setattr(index_module, "CHUNK_BYTES", 5000)
    parts = build_index(corpus, str(tmp_path / "parts"), Options(str(model)), workers=3)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")
    assert {**whole, "files": 0} == {**parts, "files": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{suffix}" for name in ("whole", "parts") for suffix in ("bin", "idx", "json")
    )


def test_compressed_input(tmp_path, corpus, model):
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    build_index(packed, str(tmp_path / "packed"), Options(str(model)), workers=1)
    build_index(corpus, str(tmp_path / "bare"), Options(str(model)), workers=1)
    assert files(tmp_path / "packed") == files(tmp_path / "bare")


def test_blank_lines_and_empty_documents_are_left_out(tmp_path, model):
    source = write_jsonl(tmp_path / "c.jsonl", ["one", "", "two"])
    source.write_text(source.read_text() + "\n \n")
    assert build_index(source, str(tmp_path / "c"), Options(str(model)))["documents"] == 2


def test_second_call_does_nothing_and_other_settings_are_refused(tmp_path, corpus, model):
    prefix = str(tmp_path / "data")
    first = build_index(corpus, prefix, Options(str(model)), workers=1)
    before = os.stat(f"{prefix}.bin").st_ino
    assert build_index(corpus, prefix, Options(str(model)), workers=2) == first
    assert os.stat(f"{prefix}.bin").st_ino == before
    with pytest.raises(UserError, match=r"append_eod differ.*--force"):
        build_index(corpus, prefix, Options(str(model), append_eod=False), workers=1)
    record = build_index(corpus, prefix, Options(str(model), append_eod=False), workers=1, force=True)
    assert record["tokens"] == first["tokens"] - first["documents"]
    Path(f"{prefix}.idx").unlink()
    assert build_index(corpus, prefix, Options(str(model), append_eod=False), workers=1) == record
    assert Path(f"{prefix}.idx").exists()


@pytest.fixture
def long_corpus(tmp_path):
    return write_jsonl(tmp_path / "long.jsonl", [sentences(60, seed) for seed in range(600)])


def launch(command, prefix):
    """A run in a process of its own, once it has left its first shard."""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(Path(f"{prefix}.parts").glob("*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def start(source, prefix, model):
    """A run with small chunks and two workers."""
    script = Path(f"{prefix}.py")
    script.write_text(SLOW_RUN)
    return launch([sys.executable, str(script), str(source), str(prefix), str(model)], prefix)


def test_killed_run_goes_on_where_it_stopped(tmp_path, long_corpus, model, monkeypatch):
    prefix = tmp_path / "data"
    process = start(long_corpus, prefix, model)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stderr.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, "workers outlive their parent"
    assert not Path(f"{prefix}.bin").exists() and not Path(f"{prefix}.idx").exists()
    done = {path.name for path in Path(f"{prefix}.parts").glob("*.json")}
    assert done
    monkeypatch.setattr(index_module, "CHUNK_BYTES", 20_000)
    tokenized = []
    work = index_module._tokenize
    monkeypatch.setattr(index_module, "_tokenize", lambda chunk: (tokenized.append(chunk.shard.name), work(chunk)))
    build_index(long_corpus, str(prefix), Options(str(model)), workers=1)
    assert tokenized and not {f"{name}.json" for name in tokenized} & done
    monkeypatch.undo()
    build_index(long_corpus, str(tmp_path / "fresh"), Options(str(model)), workers=1)
    assert files(prefix) == files(tmp_path / "fresh")
    assert not Path(f"{prefix}.parts").exists()


def test_interrupt_ends_with_one_line(tmp_path, long_corpus, model):
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED_RUN)
    arguments = ["index", "--input", long_corpus, "--tokenizer", model, "--output-prefix", tmp_path / "data"]
    process = launch([sys.executable, str(script), *map(str, arguments), "--workers", "2"], tmp_path / "data")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "megatron-opt data: interrupted; the same command goes on\n")
    assert not (tmp_path / "data.idx").exists()


def test_two_runs_do_not_write_one_dataset(tmp_path, long_corpus, model):
    process = start(long_corpus, tmp_path / "data", model)
    with pytest.raises(UserError, match="another run is writing"):
        build_index(long_corpus, str(tmp_path / "data"), Options(str(model)), workers=1)
    assert process.wait(60) == 0
    process.stderr.close()
    assert (tmp_path / "data.idx").exists()


def test_leftovers_of_a_kill_are_swept(tmp_path, corpus, model):
    (tmp_path / ".data.bin.abcd1234").write_bytes(b"half")
    (tmp_path / ".data.bin.notes-of-mine").write_bytes(b"whole")
    build_index(corpus, str(tmp_path / "data"), Options(str(model)), workers=1)
    assert not (tmp_path / ".data.bin.abcd1234").exists()
    assert (tmp_path / ".data.bin.notes-of-mine").exists()


def test_worker_that_dies_is_reported(tmp_path, long_corpus, model):
    process = start(long_corpus, tmp_path / "data", model)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "a worker process died" in said
    assert not (tmp_path / "data.idx").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "broken"', "line 121: malformed JSON"),
        ('{"body": "x", "title": "y"}', "line 121: no key 'text', there are 'body', 'title'"),
        ('["text"]', "line 121: a JSON object is expected, not list"),
        ('{"text": 5}', "line 121: 'text' holds int"),
        ('{"text": "\\ud800"}', "line 121: .*surrogate"),
        ("\udcff", "line 121: byte 0 is not UTF-8"),
    ],
)
def test_bad_lines(tmp_path, corpus, model, line, says, workers, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK_BYTES", 20_000)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UserError, match=says):
        build_index(bad, str(tmp_path / "bad"), Options(str(model)), workers=workers)
    assert not (tmp_path / "bad.bin").exists() and not (tmp_path / "bad.idx").exists()


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(tmp_path, model, text):
    (tmp_path / "empty.jsonl").write_text(text)
    with pytest.raises(UserError, match="holds no text"):
        build_index(tmp_path / "empty.jsonl", str(tmp_path / "empty"), Options(str(model)), workers=1)


def test_missing_corpus_and_tokenizer(tmp_path, corpus, model):
    with pytest.raises(UserError, match=r"nothing\.jsonl does not exist"):
        build_index(tmp_path / "nothing.jsonl", str(tmp_path / "p"), Options(str(model)))
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        build_index(corpus, str(tmp_path / "p"), Options(str(tmp_path / "none.model")))


def test_unwritable_output(tmp_path, corpus, model):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot create the folder"):
        build_index(corpus, str(tmp_path / "file" / "data"), Options(str(model)), workers=1)


def test_dataset_of_somebody_else_is_kept(tmp_path, corpus, model):
    (tmp_path / "data.bin").write_bytes(b"tokens of another tool")
    with pytest.raises(UserError, match=r"data\.bin exists .*--force"):
        build_index(corpus, str(tmp_path / "data"), Options(str(model)), workers=1)
    assert (tmp_path / "data.bin").read_bytes() == b"tokens of another tool"
    build_index(corpus, str(tmp_path / "data"), Options(str(model)), workers=1, force=True)


def test_run_killed_between_its_files_goes_on(tmp_path, corpus, model):
    first = build_index(corpus, str(tmp_path / "data"), Options(str(model)), workers=1)
    (tmp_path / "data.json").unlink()
    (tmp_path / "data.parts").mkdir()
    (tmp_path / "data.parts" / ".lock").touch()
    assert build_index(corpus, str(tmp_path / "data"), Options(str(model)), workers=1) == first


def test_parquet_goes_through_corpus(tmp_path, model):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="data corpus --input"):
        build_index(tmp_path / "a.parquet", str(tmp_path / "data"), Options(str(model)))


def test_json_that_is_not_ours_is_kept(tmp_path, model):
    source = write_jsonl(tmp_path / "mine.json", ["one", "two"])
    with pytest.raises(UserError, match="would be lost"):
        build_index(source, str(tmp_path / "mine"), Options(str(model)), force=True)
    assert "two" in source.read_text()


def test_full_disk_leaves_nothing_half_written(tmp_path, corpus, model):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from megatron_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["data", "index", "--input", corpus, "--tokenizer", model, "--output-prefix", tmp_path / "d"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "File too large" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["d.parts"]
