"""Tasks out of held-out text: the right answer is what stands there, the wrong ones are as frequent; a seed decides all."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_opt import cli
from megatron_opt.errors import UserError
from megatron_opt.evaluation import make_tasks

WORDS_ARE_TOKENS = {
    "version": "1.0", "added_tokens": [{"id": 1, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
                                        "rstrip": False, "normalized": False}],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"},
}  # fmt: skip


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Paragraphs of words whose frequencies fall by rank, as in real text."""
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 7))) for _ in range(300)]
    weights = [1 / (rank + 3) for rank in range(300)]
    path = tmp_path_factory.mktemp("text") / "valid.jsonl"
    with path.open("w") as stream:
        for _ in range(150):
            said = [" ".join(draw.choices(words, weights, k=draw.randint(8, 16))).capitalize() + "." for _ in range(4)]
            stream.write(json.dumps({"text": " ".join(said[:2]) + "\n\n" + " ".join(said[2:])}) + "\n")
    return path


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tasks"
    assert cli.main(["eval", "make-tasks", "--input", str(text), "--output", str(folder), "--items", "100"]) == 0
    return folder


def test_the_right_answer_is_what_the_text_says(text: Path, made: Path) -> None:
    whole = " ".join(" ".join(row["text"].split()) for row in _rows(text))
    for row in _rows(made / "heldout_cloze.jsonl"):
        said = [f"{row['context']} {choice}" in whole for choice in row["choices"]]
        assert len(said) == 4 == len(set(row["choices"])) and said[row["answer"]] and sum(said) == 1
        assert 10 <= len(row["context"].split()) <= 40
    for name in ("heldout_word", "heldout_order"):
        for row in _rows(made / f"{name}.jsonl"):
            right, wrong = row["choices"][row["answer"]], row["choices"][1 - row["answer"]]
            assert right in whole and wrong not in whole
            differing = [pair for pair in zip(right.split(), wrong.split(), strict=True) if pair[0] != pair[1]]
            assert len(differing) == (1 if name == "heldout_word" else 2)
            if name == "heldout_order":
                assert sorted(right.split()) == sorted(wrong.split())


def test_wrong_words_are_as_frequent_and_answers_fall_everywhere(text: Path, made: Path) -> None:
    counts = Counter(word for row in _rows(text) for word in row["text"].split())
    rows = _rows(made / "heldout_cloze.jsonl")
    likeliest = [max(range(4), key=lambda one, row=row: counts[row["choices"][one]]) == row["answer"] for row in rows]
    assert 0.1 < sum(likeliest) / len(rows) < 0.42  # a guess by frequency is a guess
    for name, places in (("heldout_cloze", 4), ("heldout_word", 2), ("heldout_order", 2)):
        found = Counter(row["answer"] for row in _rows(made / f"{name}.jsonl"))
        assert len(found) == places and min(found.values()) > 50 / places


def test_a_seed_decides_all(text: Path, made: Path, tmp_path: Path) -> None:
    make_tasks.make([str(text)], tmp_path / "same", 100)
    make_tasks.make([str(text)], tmp_path / "other", 100, seed=1)
    for path in made.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "other/heldout_cloze.jsonl").read_bytes() != (made / "heldout_cloze.jsonl").read_bytes()


def test_items_fit_a_model(text: Path, made: Path, tmp_path: Path, capsys) -> None:
    # the text has single spaces, so that a token a word is the count of words
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(WORDS_ARE_TOKENS))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    words = ["eval", "make-tasks", "--input", str(text), "--output", str(tmp_path / "short"), "--items", "40"]
    assert cli.main([*words, "--tokenizer", str(tokenizer), "--max-tokens", "12"]) == 0
    for name in ("heldout_cloze", "heldout_word", "heldout_order"):
        rows = _rows(tmp_path / "short" / f"{name}.jsonl")
        lengths = [len(f"{row.get('context', '')} {choice}".split()) for row in rows for choice in row["choices"]]
        assert len(rows) == 40 and max(lengths) == 12
    assert max(len(row["choices"][0].split()) for row in _rows(made / "heldout_word.jsonl")) > 12
    assert cli.main([*words, "--max-tokens", "12"]) == 2 and "give both or neither" in capsys.readouterr().err


def test_too_little_text_and_a_full_folder_are_refused(text: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"enough text for \d+ items of heldout_cloze, not 5000"):
        make_tasks.make([str(text)], tmp_path / "many", 5000)
    with pytest.raises(UserError, match="not empty"):
        make_tasks.make([str(text)], made)
    assert not (tmp_path / "many").exists()
