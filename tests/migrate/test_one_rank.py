"""One conversion by whole runs on one rank: Megatron's own Adam to SOAP, weights and moments; the other layouts are slow."""

from pathlib import Path

import pytest
import torch

from tests.migrate.runs import ADAM, STOP, convert, launch, tensors, weights

pytestmark = pytest.mark.timeout(300)


def test_a_warm_soap_has_megatrons_weights_and_moments(tmp_path: Path) -> None:
    train = ["--optimizer", "adam", *ADAM, "--train-iters", str(STOP), "--save", str(tmp_path / "adam")]
    launch("megatron_opt.pretrain", 1, [*train, "--save-interval", str(STOP)], tmp_path)
    said = convert(tmp_path, "adam", "soap", 1, "--optimizer", "soap", "--soap-block-size", "0")
    assert "--lr-warmup-iters" in said and "the schedule counts from here" in said
    before, after = weights(tmp_path / "adam"), weights(tmp_path / "soap")
    assert before.keys() == after.keys() and len(before) > 5
    assert all(torch.equal(after[key], before[key]) for key in before)
    soap = tensors(tmp_path / "soap", "linear_proj")
    adam = tensors(tmp_path / "adam", "linear_proj")
    print(sorted(soap), sorted(adam))
