"""Checkpoints written by several ranks are read as those of one, and an imported one is started from on any layout."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from megatron_opt.export import families, names
from megatron_opt.export.exporting import export
from megatron_opt.export.importing import import_model
from megatron_opt.export.reading import Checkpoint
from tests.migrate.runs import launch, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FOUR = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


def test_four_ranks_write_what_one_writes_and_start_from_what_it_exports(tmp_path: Path) -> None:
    train = ["--optimizer", "adamw", "--train-iters", "1", "--save-interval", "1"]
    launch("megatron_opt.pretrain", 1, [*train, "--save", str(tmp_path / "one")], tmp_path)
    launch("megatron_opt.pretrain", 4, [*train, "--save", str(tmp_path / "four"), *FOUR], tmp_path)
    one, four = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "four")
    for parameter in names.parameters(families.spec_of(one.args)):
        torch.testing.assert_close(four(parameter.name), one(parameter.name), rtol=1e-4, atol=1e-6)
    export(tmp_path / "four", tmp_path / "hf", keep_padding=True)
    import_model(tmp_path / "hf", tmp_path / "start")
    start = ["--optimizer", "adamw", "--train-iters", "2", "--load", str(tmp_path / "start"), "--finetune"]
    first = losses(launch("megatron_opt.pretrain", 1, start, tmp_path))
    again = losses(launch("megatron_opt.pretrain", 4, [*start, *FOUR], tmp_path))
    assert sorted(first) == [1, 2] and first == pytest.approx(again, rel=1e-5)
    assert (
        first[1]
        != losses(launch("megatron_opt.pretrain", 1, ["--optimizer", "adamw", "--train-iters", "2"], tmp_path))[1]
    )
