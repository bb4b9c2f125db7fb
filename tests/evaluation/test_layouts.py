"""Several ranks answer every item as one process does, and refuse together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import apart

apart.lm_eval()

from megatron_opt import cli  # noqa: E402
from tests.evaluation import models  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = "arc_easy,hellaswag,mmlu_anatomy,own_texts,own_continued"
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
GPT2 = (
    f"--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length {models.LENGTH} --max-position-embeddings "
    f"{models.LENGTH} --position-embedding-type learned_absolute"
)


def _words(root: Path, items: Path, tasks: str = NAMES) -> list[str]:
    words = ["eval", root / "checkpoints", "--tasks", tasks, "--tokenizer", root / "tokenizer.json"]
    return [*map(str, [*words, "--tasks-path", root / "data", "--items", items, "--output", root / "results.json"])]


def _launch(ranks: int, words: list[str]) -> subprocess.CompletedProcess:
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), apart.FOLDER])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += ["-m", "megatron_opt.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize(("flags", "layouts"), [
    (models.FLAGS, [(2, TP2), (2, PP2), (2, [])]),
    (GPT2, [(4, [*TP2, *PP2])]),
], ids=["llama", "gpt2"])  # fmt: skip
def test_every_item_equals_one_process(flags: str, layouts: list, tmp_path: Path) -> None:
    models.checkpoint(tmp_path, flags)
    models.data(tmp_path / "data", items=60)
    assert cli.main(_words(tmp_path, tmp_path / "one.jsonl")) == 0
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert len(one) == 3 * 60 + 2 * 12
    results = json.loads((tmp_path / "results.json").read_text())
    for ranks, layout in layouts:
        done = _launch(ranks, [*_words(tmp_path, tmp_path / "many.jsonl"), *layout])
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
        assert done.stdout.count("arc_easy") == 1
        many = [json.loads(line) for line in (tmp_path / "many.jsonl").read_text().splitlines()]
        for first, second in zip(one, many, strict=True):
            rolling = first["task"] == "own_texts"
            assert rolling or first["metrics"] == second["metrics"]
            for mine, other in zip(first["answers"], second["answers"], strict=True):
                if isinstance(mine, list):
                    assert other[0] == pytest.approx(mine[0], rel=1e-6, abs=1e-5) and other[1] == mine[1]
                else:
                    assert other == (pytest.approx(mine, rel=1e-6, abs=1e-5) if rolling else mine)
        again = json.loads((tmp_path / "results.json").read_text())
        for name in ("arc_easy", "hellaswag", "mmlu_anatomy"):
            assert again["evaluation"]["iter_0000000"][name] == results["evaluation"]["iter_0000000"][name]


def test_all_ranks_refuse_together(tmp_path: Path) -> None:
    models.checkpoint(tmp_path)
    path = models.data(tmp_path / "data", items=4) / "own.jsonl"
    path.write_text(path.read_text().replace('"more"', '"less"', 1))
    done = _launch(2, _words(tmp_path, tmp_path / "items.jsonl", "own_continued"))
    assert done.returncode != 0 and done.stderr.count("line 2 has no less") == 1, done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr and "exitcode  : 1 " not in done.stderr
