"""`megatron-opt eval make-tasks`: tasks out of held-out text that small models can show, each a choice among likely words.

| task           | an item                                                                     | by chance |
|----------------|-----------------------------------------------------------------------------|-----------|
| heldout_cloze  | which of four words goes on with a passage (as LAMBADA, arXiv 1606.06031)     | 1/4       |
| heldout_word   | a sentence, or it with one word replaced (a minimal pair, arXiv 1912.00582)  | 1/2       |
| heldout_order  | a sentence, or it with two neighbouring words exchanged                      | 1/2       |

A wrong word is one whose frequency in the text is nearest to the right one's, so that frequency alone answers nothing.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_opt.data.read import documents, find_files
from megatron_opt.data.tokenizer import load_tokenizer
from megatron_opt.errors import UserError, number
from megatron_opt.files import sha256, write_output

_WORD = re.compile(r"[a-z]{3,}")  # a word that may be asked for: it begins no sentence and is no name
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_NEAR = 20  # words of nearly the same frequency that a wrong one is drawn from
_WRONG = 3
_LEAST, _MOST = 6, 30  # words of a sentence

Item = dict[str, Any]


def main(argv: list[str], prog: str) -> int:
    """Write the tasks; bad input raises UserError."""
    parser = argparse.ArgumentParser(prog, description="Make cloze and minimal-pair tasks out of held-out text.")
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text that no training has seen")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is empty or not there")
    parser.add_argument(
        "--items", type=number(1, whole=True), default=500, metavar="N", help="items of each task (500)"
    )
    parser.add_argument(
        "--context-words",
        type=number(5, whole=True),
        default=40,
        metavar="N",
        help="at most so many before a cloze (40)",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="of the models, with --max-tokens")
    parser.add_argument(
        "--max-tokens",
        type=number(1, whole=True),
        metavar="N",
        help="only items that fit so many positions, a model's sequence length",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the items (0)")
    parser.add_argument("--json-key", default="text", help="of the text in JSONL and Parquet (text)")
    args = parser.parse_args(argv)
    if bool(args.tokenizer) != bool(args.max_tokens):
        raise UserError("--max-tokens counts the tokens of --tokenizer FILE; give both or neither.")
    fits = _fitting(args.tokenizer, args.max_tokens) if args.max_tokens else None
    for line in make(args.input, args.output, args.items, args.context_words, args.seed, args.json_key, fits):
        print(line)
    return 0


def make(
    inputs: list[str],
    output: Path,
    items: int = 500,
    context: int = 40,
    seed: int = 0,
    key: str = "text",
    fits: Callable[[Item], bool] | None = None,
) -> list[str]:
    """Write the tasks into `output`; returns what to say. Raises UserError before anything is written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} is there already and not empty; give another folder.")
    files = find_files(inputs)
    texts = [" ".join(paragraph.split()) for path in files for paragraph in _paragraphs(path, key)]
    words = _Words(texts)
    makers: dict[str, Callable[[random.Random], Iterator[Item]]] = {
        "heldout_cloze": lambda draw: _cloze(texts, words, draw, context),
        "heldout_word": lambda draw: _replaced(texts, words, draw),
        "heldout_order": lambda draw: _exchanged(texts, draw),
    }
    made: dict[str, list[Item]] = {}
    for name, maker in makers.items():
        made[name] = list(islice(filter(fits or (lambda _: True), maker(random.Random(f"{seed}:{name}"))), items))
        if len(made[name]) < items:
            raise UserError(
                f"--input has enough text for {len(made[name])} items of {name}, not {items}; give more text or --items."
            )
    for name, rows in made.items():
        write_output(output / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_output(output / f"{name}.yaml", yaml.safe_dump(_task(name), sort_keys=False))
    group = {
        "group": "heldout", "task": list(made), "metadata": {"version": 1.0},
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
    }  # fmt: skip
    write_output(output / "heldout.yaml", yaml.safe_dump(group, sort_keys=False))
    record = {
        "input": {str(path): sha256(path) for path in files},
        "seed": seed,
        "items": items,
        "context_words": context,
    }
    write_output(output / "made_from.json", json.dumps(record, indent=1) + "\n")
    return [
        f"{output}: {', '.join(made)} of {items} items each, the group heldout",
        f"Evaluate by them: megatron-opt eval CHECKPOINT --tasks heldout --tasks-path {output}",
    ]


def _fitting(tokenizer: Path, most: int) -> Callable[[Item], bool]:
    """Whether a model of `most` positions can score every choice of an item with all of its context."""
    words = load_tokenizer(tokenizer)

    def fits(item: Item) -> bool:
        before = f"{item['context']} " if "context" in item else ""
        return all(len(words.encode(before + choice)) <= most for choice in item["choices"])

    return fits


def _paragraphs(path: Path, key: str) -> Iterator[str]:
    for document in documents(path, key):
        yield from re.split(r"\n\s*\n", document.text)


def _task(name: str) -> dict[str, Any]:
    cloze = name == "heldout_cloze"
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,
        "doc_to_text": "{{context}}" if cloze else "",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " " if cloze else "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


class _Words:
    """Words of the texts in the order of their frequency, and which are near one in it."""

    def __init__(self, texts: list[str]):
        counts = Counter(word for text in texts for word in text.split() if _WORD.fullmatch(word))
        self._order = sorted(counts, key=lambda word: (-counts[word], word))
        self._rank = {word: rank for rank, word in enumerate(self._order)}

    def wrong(self, right: str, draw: random.Random, count: int, barred: set[str]) -> list[str]:
        """`count` other words from the nearest in frequency that the sentence has not; fewer where there are none."""
        rank = self._rank[right]
        low = max(0, min(rank - _NEAR // 2, len(self._order) - _NEAR - 1))
        near = [word for word in self._order[low : low + _NEAR + 1] if word != right and word not in barred]
        return draw.sample(near, min(count, len(near)))


def _shuffled(right: Any, wrong: list[Any], draw: random.Random) -> Item:
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"choices": choices, "answer": choices.index(right)}


def _cloze(texts: list[str], words: _Words, draw: random.Random, most: int) -> Iterator[Item]:
    """One place of each text, in drawn order; the context is whole words of the same paragraph."""
    for text in draw.sample(texts, len(texts)):
        said = text.split(" ")
        choices = [at for at in range(10, len(said)) if _WORD.fullmatch(said[at])]
        if not choices:
            continue
        at = draw.choice(choices)
        context = said[max(0, at - most) : at]
        wrong = words.wrong(said[at], draw, _WRONG, set(context))
        if len(wrong) == _WRONG:
            yield {"context": " ".join(context), **_shuffled(said[at], wrong, draw)}


def _sentences(texts: list[str], draw: random.Random) -> Iterator[list[str]]:
    """One sentence of each text, in drawn order, as words."""
    for text in draw.sample(texts, len(texts)):
        whole = [one.split(" ") for one in _SENTENCE.split(text) if one[:1].isupper() and one[-1:] in ".!?"]
        fitting = [one for one in whole if _LEAST <= len(one) <= _MOST]
        if fitting:
            yield draw.choice(fitting)


def _replaced(texts: list[str], words: _Words, draw: random.Random) -> Iterator[Item]:
    for said in _sentences(texts, draw):
        choices = [at for at in range(1, len(said)) if _WORD.fullmatch(said[at])]
        if not choices:
            continue
        at = draw.choice(choices)
        if wrong := words.wrong(said[at], draw, 1, set(said)):
            other = [*said[:at], wrong[0], *said[at + 1 :]]
            yield _shuffled(" ".join(said), [" ".join(other)], draw)


def _exchanged(texts: list[str], draw: random.Random) -> Iterator[Item]:
    for said in _sentences(texts, draw):
        pairs = [
            at
            for at in range(1, len(said) - 1)
            if said[at] != said[at + 1] and _WORD.fullmatch(said[at]) and _WORD.fullmatch(said[at + 1])
        ]
        if pairs:
            at = draw.choice(pairs)
            other = [*said[:at], said[at + 1], said[at], *said[at + 2 :]]
            yield _shuffled(" ".join(said), [" ".join(other)], draw)
