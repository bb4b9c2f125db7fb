"""A rank's own reading of a checkpoint gives the model that `generate` and `export` read whole."""

from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.evaluation import ranks
from megatron_opt.evaluation.model import RankModel, check_layout
from megatron_opt.evaluation.scoring import Request, Scorer
from megatron_opt.export import model as whole
from megatron_opt.export.reading import Checkpoint
from tests.export import models

TOKENS = torch.randint(0, models.IDS, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "case", ["llama-gqa-tied", "gpt2", "mixtral", "mixtral/transformer engine", "bf16", "bf16/averaged"]
)
def test_logits_are_those_of_the_whole_model(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = models.flags(models.CASES[case.split("/")[0]])
    if "engine" in case:
        _name_norms_as_transformer_engine(monkeypatch)
    source = Checkpoint(models.save(args, models.weights(args), tmp_path / "ours"))
    if "averaged" in case:  # what is in the place of the weights: tests/distributed/test_weight_average.py
        source.averages = lambda name, weights, *shard: 1.3 * weights
    with whole.one_process():
        expected = whole.logits(whole.build(whole.of_checkpoint(source.args), source), TOKENS)
    with ranks.world(1, 1):
        found = RankModel(source, 1, 1).logits(TOKENS)
    assert found is not None and expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def _name_norms_as_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of checkpoints to be saved: its layers with experts fuse no norm."""
    from megatron.core import dist_checkpointing

    save = dist_checkpointing.save

    def renamed(state: dict[str, Any], *rest: Any, **named: Any) -> None:
        norms = [one for one in state["model"].values() if "mlp.linear_fc1.layer_norm_" in getattr(one, "key", "")]
        assert norms
        for one in norms:
            one.key = one.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
        save(state, *rest, **named)

    monkeypatch.setattr(dist_checkpointing, "save", renamed)


@pytest.mark.parametrize(("tp", "pp", "said"), [
    (1, 3, "--pipeline-model-parallel-size 3 does not divide the model's 2 layers"),
    (3, 1, "--tensor-model-parallel-size 3 does not divide the model's 4 attention heads"),
    (4, 1, "--tensor-model-parallel-size 4 does not divide the model's 2 query groups"),
])  # fmt: skip
def test_a_layout_that_cannot_cut_the_model_is_refused(tp: int, pp: int, said: str) -> None:
    args = models.flags(models.CASES["llama-gqa-tied"])
    check_layout(args, 2, 2)
    with pytest.raises(UserError, match=said):
        check_layout(args, tp, pp)


def test_ranks_that_do_not_fit_the_layout_are_refused() -> None:
    with pytest.raises(UserError, match="torchrun --nproc-per-node 4"), ranks.world(2, 2):
        pass


def test_answers_of_a_diverged_model_are_refused() -> None:
    broken = SimpleNamespace(last=True, logits=lambda ids: torch.full((*ids.shape, 5), float("nan")))
    request = Request(array("i", [1, 3]), array("i", [2]))
    with ranks.world(1, 1), pytest.raises(UserError, match="log-likelihoods are not finite"):
        Scorer(broken, SimpleNamespace(vocab_size=5, eod=0), 2).score([request])
    even = SimpleNamespace(last=True, logits=lambda ids: torch.zeros(*ids.shape, 8))
    with ranks.world(1, 1):  # what pads the vocabulary has no share
        (answer,) = Scorer(even, SimpleNamespace(vocab_size=5, eod=0), 2).score([request])
    assert answer.loglikelihood == pytest.approx(-1.6094379124341003) and not answer.greedy
