"""Tasks without a model: what one of so many positions cannot answer is refused, and what it can is not."""

import json
import random
from pathlib import Path

import pytest

from tests import apart

apart.lm_eval()

from megatron_opt.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_opt.errors import UserError  # noqa: E402
from megatron_opt.evaluation import make_tasks  # noqa: E402
from megatron_opt.study import downstream  # noqa: E402
from megatron_opt.study.study_file import read_study  # noqa: E402
from tests.evaluation import models  # noqa: E402
from tests.study.conftest import STUDY  # noqa: E402


def test_a_study_whose_models_are_too_short_for_its_tasks_is_refused_before_any_run(tmp_path: Path) -> None:
    draw = random.Random(5)
    said = [" ".join(draw.choices(models.WORDS, k=draw.randint(12, 24))).capitalize() + "." for _ in range(60)]
    (tmp_path / "valid.jsonl").write_text(json.dumps({"text": "\n\n".join(said)}) + "\n")
    make_tasks.make([str(tmp_path / "valid.jsonl")], tmp_path / "tasks", 20)
    models.tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    words = load_tokenizer(tmp_path / "tokenizer.json")
    rows = [
        json.loads(line)
        for name in ("word", "order")
        for line in (tmp_path / f"tasks/heldout_{name}.jsonl").read_text().splitlines()
    ]
    longest = max(len(words.encode(choice)) for row in rows for choice in row["choices"])
    file = tmp_path / "study.yaml"
    plain = STUDY.replace("tokenizer.model", "tokenizer.json") + "eval: {tasks: [heldout], tasks_path: tasks}\n"
    file.write_text(plain.replace("sequence_length: 64", f"sequence_length: {longest}"))
    downstream.rehearse(read_study(file))
    file.write_text(plain.replace("sequence_length: 64", f"sequence_length: {longest - 1}"))
    with pytest.raises(UserError, match=rf"`eval:` of the study: an answer of a task .* has {longest} tokens"):
        downstream.rehearse(read_study(file))
