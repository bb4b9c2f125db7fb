"""What cannot be evaluated ends with one sentence and exit code 2: tasks, their files, their data, tokenizers."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import apart

apart.lm_eval()

from megatron_opt import cli  # noqa: E402
from megatron_opt.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_opt.errors import UserError  # noqa: E402
from megatron_opt.evaluation import cli as command  # noqa: E402
from megatron_opt.evaluation import local_data, tasks  # noqa: E402
from megatron_opt.evaluation import results as written  # noqa: E402
from tests.evaluation import models  # noqa: E402

ARC, MMLU = "allenai/ai2_arc/ARC-Easy/test.jsonl", "cais/mmlu/anatomy/test.jsonl"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    models.checkpoint(folder)
    models.data(folder / "data", items=8)
    return folder


@pytest.fixture
def data(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "data", tmp_path / "data")
    return tmp_path / "data"


def _change(path: Path, line: int, **values: object) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[line - 1])
    lines[line - 1] = json.dumps({key: one for key, one in {**row, **values}.items() if one != "absent"})
    path.write_text("\n".join(lines) + "\n")


def _refused(capsys, root: Path, data: Path, *words: object, tasks: str = "arc_easy") -> str:
    capsys.readouterr()
    more = [] if "--tokenizer" in words else ["--tokenizer", root / "tokenizer.json"]
    words = ("eval", root / "checkpoints", "--tasks", tasks, "--tasks-path", data, *more, *words)
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def test_an_unknown_task_and_what_was_meant(root: Path, data: Path, capsys) -> None:
    said = _refused(capsys, root, data, tasks="arc_esay")
    assert "there is no task arc_esay" in said and "Did you mean arc_easy?" in said
    assert "--tasks is empty" in _refused(capsys, root, data, tasks=",")
    assert "is no folder" in _refused(capsys, root, data / "nowhere")


def test_malformed_lines_are_named(root: Path, data: Path, capsys) -> None:
    path = data / ARC
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:-9], *lines[3:]]))
    assert f"{path}, line 3 is not JSON" in _refused(capsys, root, data)
    path.write_text("\n".join([*lines[:4], "[1]", *lines[5:]]))
    assert "line 5 is no JSON object" in _refused(capsys, root, data)


@pytest.mark.parametrize(("changed", "said"), [
    ({"answerKey": "absent"}, "line 2 has no answerKey"),
    ({"answer_key": "A"}, "line 2 has answer_key, which the first item has not"),
    ({"question": None}, "line 2: question is null"),
    ({"question": 7}, "line 2: question is a number, in the first item it is a text"),
    ({"choices": {"text": ["a", "b"]}}, "line 2, choices has no label"),
    ({"answerKey": "Z"}, "the task arc_easy: an item is not of the form"),
])  # fmt: skip
def test_items_of_another_form_are_refused(data: Path, changed: dict, said: str) -> None:
    _change(data / ARC, 2, **changed)
    with pytest.raises(UserError, match=said):
        _build("arc_easy", data)


def test_a_right_answer_that_is_no_choice_is_refused_where_the_harness_would_count_it_wrong(data: Path) -> None:
    _change(data / MMLU, 3, answer=4)
    with pytest.raises(UserError, match="the task mmlu_anatomy, item 3: the right answer 4 is none of its 4 choices"):
        _build("mmlu_anatomy", data)


def test_an_item_without_choices_is_refused(data: Path) -> None:
    _change(data / "Rowan/hellaswag/data/validation.jsonl", 2, endings=[])
    with pytest.raises(UserError, match=r"the task hellaswag, item 2: the right answer . is none of its 0 choices"):
        _build("hellaswag", data)


def _build(name: str, data: Path) -> None:
    (task,) = tasks.load([name], data)["tasks"].values()
    task.build_all_requests(rank=0, world_size=1)


def test_task_files_and_absent_data_are_refused(root: Path, data: Path, capsys, monkeypatch) -> None:
    shutil.rmtree(data / "allenai/ai2_arc/ARC-Easy")
    (data / "allenai/ai2_arc/ARC-Challenge").mkdir()
    assert "has no folder ARC-Easy" in _refused(capsys, root, data)
    shutil.rmtree(data / "allenai")

    def offline(**asked: object) -> None:
        raise ConnectionError("no way to the hub")

    with pytest.raises(UserError, match=r"allenai/ai2_arc cannot be fetched \(ConnectionError: no way.*--tasks-path"):
        local_data.loader(data, offline)("allenai/ai2_arc", "ARC-Easy")
    own = (data / "texts.yaml").read_text().replace("own_texts", "mine")
    (data / "mine.yaml").write_text(own.replace("metric: bits_per_byte", "metric: nosuch"))
    assert "a task names a metric, which is not there" in _refused(capsys, root, data, tasks="mine")
    (data / "mine.yaml").unlink()
    (data / "broken.yaml").write_text("task: mine\n  dataset_path: [json\n")
    assert f"the task file {data / 'broken.yaml'} cannot be read" in _refused(capsys, root, data, tasks="own_texts")


def test_a_tokenizer_of_another_vocabulary_is_refused(root: Path, data: Path, capsys, tmp_path: Path) -> None:
    models.tokenizer(330).save(str(tmp_path / "tokenizer.json"))
    said = _refused(capsys, root, data, "--tokenizer", tmp_path / "tokenizer.json")
    assert "it is the tokenizer of another vocabulary" in said
    capsys.readouterr()
    assert cli.main(["eval", str(root / "checkpoints"), "--tasks", "arc_easy"]) == 2
    assert "give one by --tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_the_run_was_not_trained_with_is_refused_by_its_digest(root: Path, tmp_path: Path) -> None:
    words = load_tokenizer(root / "tokenizer.json")
    for digest, fits in ((words.sha256(), True), ("0" * 64, False)):
        record = {"config": {}, "tokenizer": {"model": "words.json", "sha256": digest}}
        (tmp_path / "config.json").write_text(json.dumps(record))
        if fits:
            command._check_tokenizer(tmp_path, words)
            continue
        with pytest.raises(UserError, match=r"is not the one that the run was trained with \(words.json"):
            command._check_tokenizer(tmp_path, words)


def test_the_package_that_is_absent_is_named(root: Path, data: Path, capsys, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != apart.FOLDER])
    assert "the package lm_eval is not installed; pip install 'megatron-opt[eval]'" in _refused(capsys, root, data)


def test_results_go_beside_what_is_there_or_nowhere(root: Path, data: Path, capsys, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"status": "completed", "evaluation": {"iter_0000001": {"a": 1, "b": 2}}}')
    written.write(path, "iter_0000001", {"b": 3})
    written.write(path, "iter_0000002", {"a": 4})
    expected = {"iter_0000001": {"a": 1, "b": 3}, "iter_0000002": {"a": 4}}
    assert json.loads(path.read_text()) == {"status": "completed", "evaluation": expected}
    path.write_text("[")
    assert "is not JSON" in _refused(capsys, root, data, "--output", path)
    assert path.read_text() == "["
    assert f"{tmp_path} is a folder" in _refused(capsys, root, data, "--items", tmp_path)
