"""The harness gets from our backend what it gets from its own `hf` backend of the exported model, item by item."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import apart

apart.lm_eval()
transformers = apart.transformers()
pytest.importorskip("safetensors")

from megatron_opt import cli  # noqa: E402
from megatron_opt.evaluation import make_tasks, results, tasks  # noqa: E402
from megatron_opt.export.exporting import export  # noqa: E402
from tests.evaluation import models  # noqa: E402

NAMES = ["arc_easy", "hellaswag", "mmlu_anatomy", "own_texts", "own_continued", "heldout"]
CHOSEN = ["arc_easy", "hellaswag", "mmlu_anatomy", "heldout_cloze", "heldout_word", "heldout_order"]


def _ours(root: Path, items: int) -> None:
    models.checkpoint(root)
    models.data(root / "data", items)
    models.write(root / "text.jsonl", models.text(2 * items))
    make_tasks.make([str(root / "text.jsonl")], root / "data/heldout", items)
    words = ["eval", root / "checkpoints", "--tasks", ",".join(NAMES), "--tokenizer", root / "tokenizer.json"]
    where = ["--tasks-path", root / "data", "--output", root / "results.json", "--items", root / "items.jsonl"]
    (root / "results.json").write_text('{"status": "completed"}')
    assert cli.main([*map(str, [*words, *where]), "--num-fewshot", "1", "--batch-size", "16"]) == 0


def _theirs(root: Path) -> Any:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    export(root / "checkpoints", root / "hf", tokenizer=root / "tokenizer.json")
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(root / "hf/tokenizer.json"), eos_token="</s>")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "hf", dtype="float32", attn_implementation="eager")
    backend = HFLM(pretrained=model, tokenizer=words, batch_size=16, device="cpu")
    return evaluate(backend, tasks.load(NAMES, root / "data", 1), bootstrap_iters=1000)


@pytest.mark.parametrize("items", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_every_item_equals_the_hf_backend_of_the_export(items: int, tmp_path: Path) -> None:
    _ours(tmp_path, items)
    theirs = _theirs(tmp_path)
    mine = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    other = json.loads(json.dumps(list(results.items(theirs)), default=str))
    assert len(mine) == len(other) == 6 * items + 2 * 12
    for one, two in zip(mine, other, strict=True):
        assert {k: one[k] for k in ("task", "item", "doc_hash")} == {k: two[k] for k in ("task", "item", "doc_hash")}
        if one["task"] == "own_texts":
            assert one["answers"] == pytest.approx(two["answers"], rel=1e-6)
            continue
        assert one["metrics"] == two["metrics"]
        if one["task"] == "own_continued":
            assert one["answers"] == two["answers"]
            continue
        for (likelihood, greedy), (expected, expected_greedy) in zip(one["answers"], two["answers"], strict=True):
            assert likelihood == pytest.approx(expected, abs=1e-5) or likelihood == pytest.approx(expected, rel=1e-6)
            assert greedy == expected_greedy
    told = results.tidy(theirs, None)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["status"] == "completed"
    found = written["evaluation"]["iter_0000000"]
    assert set(found) == {*CHOSEN, "own_texts", "own_continued", "heldout"}
    assert found["heldout"]["tasks"] == CHOSEN[3:] and found["heldout_word"]["num_fewshot"] == 0
    for name in found:
        for metric, value in found[name]["metrics"].items():
            assert value["value"] == pytest.approx(told[name]["metrics"][metric]["value"], rel=1e-6)
    arc = found["arc_easy"]
    assert arc["items"] == items and arc["num_fewshot"] == 1 and 0 < arc["metrics"]["acc"]["value"] < 1
    accuracy = arc["metrics"]["acc"]["value"]
    assert arc["metrics"]["acc"]["stderr"] == pytest.approx((accuracy * (1 - accuracy) / (items - 1)) ** 0.5)
