"""A tiny model with a tokenizer of bytes, and data sets in the tasks' own formats; all from a seed."""

import json
import random
from pathlib import Path
from typing import Any

from megatron_opt.export.model import validated
from tests.export import models

LENGTH, IDS, PADDED = 320, 300, 320
FLAGS = (
    f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {LENGTH} --max-position-embeddings {LENGTH} "
    "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --ffn-hidden-size 48 "
    "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights"
)
WORDS = (
    "cell bone water light tree salt heart iron wind seed river glass stone leaf moon sand fire rain root shell".split()
)


def checkpoint(folder: Path, flags: str = FLAGS) -> Path:
    """A checkpoint with random weights, and tokenizer.json beside it."""
    args = validated([*flags.split(), "--padded-vocab-size", str(PADDED)], IDS)
    models.save(args, models.weights(args, seed=7), folder / "checkpoints")
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder / "checkpoints"


def tokenizer(size: int = IDS) -> Any:
    """Bytes, merges of WORDS up to `size` ids, `</s>` the last of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    made.add_special_tokens(["</s>"])
    return made


def _text(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def arc(draw: random.Random) -> dict[str, Any]:
    """An item as allenai/ai2_arc has it: three to five choices, labels of letters or of digits."""
    labels = draw.choice(["ABCD", "1234", "ABC", "ABCDE"])
    return {
        "id": str(draw.random()),
        "question": _text(draw, 4, 12) + "?",
        "choices": {"text": [_text(draw, 1, 4) for _ in labels], "label": list(labels)},
        "answerKey": draw.choice(labels),
    }


def hellaswag(draw: random.Random) -> dict[str, Any]:
    """An item as Rowan/hellaswag has it."""
    return {
        "ind": draw.randrange(1000), "activity_label": _text(draw, 1, 2), "ctx_a": _text(draw, 3, 8) + ".",
        "ctx_b": _text(draw, 1, 2), "ctx": "", "endings": [_text(draw, 2, 6) + " [step] x." for _ in range(4)],
        "source_id": "", "split": "val", "split_type": "indomain", "label": str(draw.randrange(4)),
    }  # fmt: skip


def mmlu(draw: random.Random) -> dict[str, Any]:
    """An item as cais/mmlu has it."""
    return {
        "question": _text(draw, 4, 8) + "?", "subject": "anatomy",
        "choices": [_text(draw, 1, 2) for _ in range(4)], "answer": draw.randrange(4),
    }  # fmt: skip


def text(paragraphs: int, seed: int = 2) -> list[dict[str, Any]]:
    """Held-out text, a sentence of WORDS a paragraph, a document of ten paragraphs."""
    draw = random.Random(seed)
    said = [_text(draw, 12, 24).capitalize() + "." for _ in range(paragraphs)]
    return [{"text": "\n\n".join(said[start : start + 10])} for start in range(0, paragraphs, 10)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


OWN = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: own.jsonl
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}metadata:
  version: 1.0
"""


def data(folder: Path, items: int = 200, seed: int = 1) -> Path:
    """Copies of three data sets, and two tasks of our own: whole texts, and continuations."""
    draw = random.Random(seed)
    write(folder / "allenai/ai2_arc/ARC-Easy/test.jsonl", [arc(draw) for _ in range(items)])
    write(folder / "allenai/ai2_arc/ARC-Easy/train.jsonl", [arc(draw) for _ in range(20)])
    write(folder / "Rowan/hellaswag/data/validation.jsonl", [hellaswag(draw) for _ in range(items)])
    write(folder / "Rowan/hellaswag/data/train.jsonl", [hellaswag(draw) for _ in range(20)])
    for split, count in (("test", items), ("dev", 5)):
        write(folder / f"cais/mmlu/anatomy/{split}.jsonl", [mmlu(draw) for _ in range(count)])
    write(folder / "own.jsonl", [{"text": _text(draw, 3, 250), "more": _text(draw, 1, 3)} for _ in range(12)])
    rolling = "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    (folder / "texts.yaml").write_text(
        OWN.format(name="own_texts", kind="loglikelihood_rolling", text="", target="{{text}}", more=rolling)
    )
    until = 'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n'
    (folder / "continued.yaml").write_text(
        OWN.format(name="own_continued", kind="generate_until", text="{{text}}", target="{{more}}", more=until)
    )
    return folder
