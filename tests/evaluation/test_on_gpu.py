"""The device of an evaluation: every operation of it on tensors that say `cuda`, with the answers of the CPU. Never run on a GPU."""

from array import array
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_opt import cli
from megatron_opt.evaluation import ranks
from megatron_opt.evaluation.model import RankModel
from megatron_opt.evaluation.scoring import Prompt, Request, Scorer
from megatron_opt.export.reading import Checkpoint
from megatron_opt.platform.pretended_gpu import OnGpu, pretended_gpu
from tests.export import models


class Words:
    vocab_size, eod = models.IDS, 7

    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("case", ["llama-gqa-tied", "gpt2"])
def test_answers_are_those_of_the_cpu(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Megatron's own gives a tensor another's storage, which what says `cuda` has not
    monkeypatch.setattr("megatron.core.utils._kernel_make_viewless_tensor", lambda given, grad: given.clone())
    args = models.flags(models.CASES[case])
    source = Checkpoint(models.save(args, models.weights(args), tmp_path / "ours"))
    requests = [Request(array("i", range(1, n)), array("i", [n, n + 1])) for n in (5, 9, 17)]
    prompts = [Prompt(array("i", one), 8, ()) for one in ([5, 8, 1], [2])]

    def answers():
        model = RankModel(source, 1, 1)
        where = {type(one) for one in model._model.parameters()}
        scorer = Scorer(model, Words(), 2)
        return where, scorer.score(requests), scorer.continue_(prompts)

    # torch's fused attention on a GPU is another operation, which the CPU has not
    with sdpa_kernel(SDPBackend.MATH), ranks.world(1, 1):
        _, expected, texts = answers()
        torch.__future__.set_overwrite_module_params_on_conversion(
            True
        )  # what says `cuda` is no storage of torch's own
        try:
            with pretended_gpu() as count:
                where, found, again = answers()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert where == {OnGpu} and count.launches["aten::mm"] + count.launches["aten::addmm"] > 100
    assert [one.greedy for one in found] == [one.greedy for one in expected] and again == texts
    for one, two in zip(found, expected):
        assert one.loglikelihood == pytest.approx(two.loglikelihood, abs=1e-6)


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tmp_path), "--tasks", "a", "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err
