"""Loops that others have written: torchtitan's, Hugging Face's, and the one in docs/torch.md."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from megatron_opt.torch import Optimizer
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
    transformers = apart.transformers()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    rows = torch.randint(0, 64, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trainer(folder: str, steps: int) -> tuple[object, object]:
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config)
        optimizer = Optimizer(model, "muon", lr=1e-2, weight_decay=0.1, clip_grad=1.0)
        assert {i.kind for g in optimizer._engine.groups for i in g.infos} == {"hidden", "embedding", "output", "norm"}
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4, logging_steps=1,
            report_to=[], use_cpu=True, max_grad_norm=0.0, seed=1, bf16=True,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
        made = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        return made, model

    whole, model = trainer("whole", 8)
    whole.train()  # type: ignore[attr-defined]
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]  # type: ignore[attr-defined]
    assert len(losses) == 8 and losses[-1] < losses[0]
    resumed, again = trainer("resumed", 8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))  # type: ignore[attr-defined]
    for (name, a), b in zip(model.named_parameters(), again.parameters()):  # type: ignore[attr-defined]
        assert torch.equal(a, b), name
