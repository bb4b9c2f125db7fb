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


@pytest.mark.slow
def test_averaged_weights_answer_as_a_checkpoint_of_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import numpy as np
    import torch

    from megatron_opt.data import indexed
    from megatron_opt.export.model import validated
    from tests.export import models as weights_of

    args = validated([*models.FLAGS.split(), "--padded-vocab-size", str(models.PADDED)], models.IDS)
    each = [weights_of.weights(args, seed) for seed in (1, 2)]
    mean = {name: (each[0][name].double() + each[1][name].double()).div(2).to(torch.float32) for name in each[0]}
    for number, one in enumerate([*each, mean]):
        saved = weights_of.save(args, one, tmp_path / str(number))
        where = tmp_path / ("mean" if number == 2 else "run") / "checkpoints" / f"iter_{min(number, 1):07d}"
        shutil.copytree(saved / "iter_0000000", where)
    models.tokenizer().save(str(tmp_path / "tokenizer.json"))
    models.write(tmp_path / "text.jsonl", models.text(60))
    make_tasks.make([str(tmp_path / "text.jsonl")], tmp_path / "tasks", 20)
    ids = np.random.default_rng(0).integers(0, models.IDS, 3 * models.LENGTH).astype(np.uint16)
    (tmp_path / "valid.bin").write_bytes(ids.tobytes())
    with (tmp_path / "valid.idx").open("wb") as stream:
        indexed.write_index(stream, np.uint16, np.array([len(ids)]))
    common = ["--tasks", "heldout", "--tasks-path", tmp_path / "tasks", "--tokenizer", tmp_path / "tokenizer.json"]
    common += ["--loss-on", tmp_path / "valid"]
    for run, more in (("run", ["--average", "2"]), ("mean", [])):
        where = ["--output", tmp_path / run / "results.json", "--items", tmp_path / run / "items.jsonl"]
        assert cli.main(list(map(str, ["eval", tmp_path / run / "checkpoints", *common, *where, *more]))) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    expected = json.loads((tmp_path / "mean" / "results.json").read_text())["evaluation"]["iter_0000001"]
    averaged = found["iter_0000001 mean of 2"]
    for task, told in expected.items():
        for name, value in told["metrics"].items():
            assert averaged[task]["metrics"][name]["value"] == pytest.approx(value["value"], rel=1e-5)
    raw = found["iter_0000001"]["validation_loss"]["metrics"]["loss"]["value"]
    assert abs(averaged["validation_loss"]["metrics"]["loss"]["value"] - raw) > 1e-3
    lines = [
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("run/items-mean.jsonl", "mean/items.jsonl")
    ]
    for one, two in zip(*lines, strict=True):
        assert one["metrics"] == two["metrics"] and one["doc_hash"] == two["doc_hash"]

    # the moving average beside both: here the mean's weights, which a run would have kept
    class Kept:
        leads = False

        def __init__(self, *given: Any) -> None: ...

        def __call__(self, name: str, weights: Any, *shard: Any) -> Any:
            return mean[name]

    monkeypatch.setattr("megatron_opt.export.averages.Averages", Kept)
    where = [
        "--output",
        tmp_path / "both.json",
        "--items",
        tmp_path / "both.jsonl",
        "--weights",
        "both",
        "--average",
        "2",
    ]
    assert cli.main(list(map(str, ["eval", tmp_path / "run" / "checkpoints", *common, *where]))) == 0
    both = json.loads((tmp_path / "both.json").read_text())["evaluation"]
    assert both.pop("iter_0000001_ema") == expected and both == found
    assert (tmp_path / "both-ema.jsonl").read_text() == (tmp_path / "mean" / "items.jsonl").read_text()
    assert (tmp_path / "both.jsonl").read_text() == (tmp_path / "run" / "items.jsonl").read_text()
