"""Loops that others have written: torchtitan's, Hugging Face's, and the one in docs/torch.md."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from tests import apart
from tests.torch import cases, ranks

DOCS = Path(__file__).parents[2] / "docs" / "torch.md"


def test_a_loop_of_torchtitans_kind(tmp_path: Path) -> None:
    first, second = ranks.run(cases.titan_loop, 2, str(tmp_path / "checkpoint"))
    assert first["losses"] == second["losses"] and first["losses"][9] < first["losses"][0] - 0.1
    assert first["rates"] == second["rates"] == pytest.approx([1e-2 * min(1, (i + 2) / 4) for i in range(12)])
    assert first["held"] + second["held"] == first["all"] and first["held"] < 0.6 * first["all"]


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "example.py").write_text(example)
    found = runpy.run_path(str(tmp_path / "example.py"), run_name="__main__")
    assert found["losses"][-1] < found["losses"][0] - 0.5


def test_hugging_faces_trainer_trains_and_resumes(tmp_path: Path) -> None:
    whole = cases.trainer(tmp_path / "whole", "muon", bf16=True, save_steps=4)
    whole.train()
    losses = cases.logged(whole)
    assert len(losses) == 8 and losses[-1] < losses[0]
    kinds = {i.kind for g in whole.optimizer.optimizer._engine.groups for i in g.infos}
    assert kinds == {"hidden", "embedding", "output", "norm"}
    resumed = cases.trainer(tmp_path / "resumed", "muon", bf16=True, save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name


def test_hugging_faces_trainer_under_ddp_is_one_process(tmp_path: Path) -> None:
    """Muon, whose matrices two ranks share out, and AdamW, which saves and resumes there."""
    apart.transformers()
    found = ranks.run(cases.trainers_under_ddp, 2, str(tmp_path))
    for rule, rounding in (("muon", 1e-6), ("adamw", 2e-5)):  # which divides small gradients by their size
        one = cases.trainer(tmp_path / rule, rule)
        one.train()
        wanted = cases.weights_of(one.model)
        for rank in found:
            assert rank[rule]["losses"] == pytest.approx(cases.logged(one), rel=1e-5)
            for name, weight in wanted.items():
                torch.testing.assert_close(rank[rule]["weights"][name], weight, rtol=1e-5, atol=rounding, msg=name)
    for rank in found:
        assert all(torch.equal(w, rank["adamw"]["weights"][name]) for name, w in rank["resumed"]["weights"].items())
    computed = [set(rank["muon"]["computed"]) for rank in found]
    assert not computed[0] & computed[1] and all(computed)
