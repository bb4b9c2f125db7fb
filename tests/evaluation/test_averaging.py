"""Averaged weights are the mean of what the checkpoints hold, and the loss over text is the cross entropy of the logits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.evaluation import averaging, ranks
from megatron_opt.evaluation.model import RankModel
from megatron_opt.evaluation.scoring import Scorer
from megatron_opt.export import model as whole
from megatron_opt.export.reading import Checkpoint
from megatron_opt.study import downstream
from tests.export import models

TOKENS = torch.randint(0, models.IDS, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", ["llama-gqa-tied", "mixtral"])
def test_the_mean_of_checkpoints_is_that_of_their_weights(case: str, tmp_path: Path) -> None:
    args = models.flags(models.CASES[case])
    each = [models.weights(args, seed) for seed in (1, 2, 3)]
    sources = [Checkpoint(models.save(args, one, tmp_path / str(k))) for k, one in enumerate(each)]
    mean = {
        name: torch.stack([one[name].double() for one in each]).mean(0).to(value.dtype)
        for name, value in each[0].items()
    }
    middle = Checkpoint(models.save(args, mean, tmp_path / "mean"))
    with whole.one_process():
        expected = whole.logits(whole.build(whole.of_checkpoint(middle.args), middle), TOKENS)
    with ranks.world(1, 1):
        found = RankModel(sources[0], 1, 1, sources[1:]).logits(TOKENS)
        first = RankModel(sources[0], 1, 1).logits(TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - first).abs().max() > 0.1


class Words:
    vocab_size, eod = 5, 0


class Model:
    """Logits that are a function of the id read."""

    last = True
    table = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def test_the_loss_over_text_is_the_cross_entropy(tmp_path: Path) -> None:
    from megatron_opt.data import indexed

    ids = np.random.default_rng(0).integers(0, 5, 6 * 16 + 1).astype(np.uint16)
    (tmp_path / "valid.bin").write_bytes(ids.tobytes())
    with (tmp_path / "valid.idx").open("wb") as stream:
        indexed.write_index(stream, np.uint16, np.array([40, len(ids) - 40]))
    asked = averaging.sequences(str(tmp_path / "valid"), 16, 4, 5)
    assert len(asked) == 4 and len(averaging.sequences(str(tmp_path / "valid"), 16, 99, 5)) == 6
    with ranks.world(1, 1):
        scorer = Scorer(Model(), Words(), 3)
        found = averaging.loss(scorer, asked)[averaging.LOSS]
    text = torch.tensor(ids[: 4 * 16 + 1].astype(np.int64))
    expected = torch.nn.functional.cross_entropy(Model.table[text[:-1]][:, :5].double(), text[1:])
    assert found["metrics"]["loss"]["value"] == pytest.approx(float(expected), rel=1e-6) and found["items"] == 4
    with pytest.raises(UserError, match="has the id 4, which the run's tokenizer of 4 has not"):
        averaging.sequences(str(tmp_path / "valid"), 16, 4, 4)
    with pytest.raises(UserError, match="less than one sequence of 128"):
        averaging.sequences(str(tmp_path / "valid"), 128, 4, 5)


def test_the_last_checkpoints_of_a_run(tmp_path: Path) -> None:
    for number in (10, 20, 30, 40):
        (tmp_path / f"iter_{number:07d}").mkdir()
    found = averaging.last_folders(tmp_path / "iter_0000030", 2)
    assert [one.name for one in found] == ["iter_0000030", "iter_0000020"]
    with pytest.raises(UserError, match=r"--average 4: .* holds 3 checkpoints up to iter_0000030"):
        averaging.last_folders(tmp_path / "iter_0000030", 4)


def test_a_study_asks_for_averages_and_reads_them_beside_the_raw(tmp_path: Path) -> None:
    from megatron_opt.study.spec import Evaluation

    words = downstream.arguments(Evaluation(("t",), average=3), tmp_path, valid="data/valid")
    assert " ".join(words).endswith("--average 3 --loss-on data/valid")
    words = " ".join(downstream.arguments(Evaluation(("t",), ema=True), tmp_path, valid="data/valid"))
    assert words.endswith("--weights both --loss-on data/valid")
    task = lambda value: {"t": {"metrics": {"acc": {"value": value, "stderr": 0.1}}}}  # noqa: E731
    results = {
        "iterations": 40,
        "evaluation": {
            "iter_0000040": task(0.5),
            averaging.name_of("iter_0000040", 3): task(0.7),
            "iter_0000040_ema": task(0.6),
            "iter_0000030_ema": task(0.1),
        },
    }
    results = json.loads(json.dumps(results))
    assert downstream.last(results) == task(0.5)
    assert downstream.averaged(results) == {"mean of 3": task(0.7), "moving average": task(0.6)}
    found = [downstream.scores([results], weights)["t"].value for weights in (None, "mean of 3", "moving average")]
    assert found == [0.5, 0.7, 0.6]
    asked = Evaluation(("t",), average=3, ema=True)
    assert downstream.is_complete(asked, results)
    del results["evaluation"]["iter_0000040_ema"]
    assert not downstream.is_complete(asked, results) and downstream.is_complete(replace(asked, ema=False), results)
    assert downstream.averaged({"iterations": 40, "evaluation": {"iter_0000040": task(0.5)}}) == {}
