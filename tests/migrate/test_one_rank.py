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
    stacked = tensors(tmp_path / "adam", "exp_avg.")
    (m,) = [value for key, value in stacked.items() if key.endswith("linear_proj.weight")]  # (layers, 32, 32)
    state = tensors(tmp_path / "soap", "linear_proj.weight")
    for layer, mean in enumerate(m):
        name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
        kinds = ("exp_avg", "q_0_0", "q_0_1", "gg_0_0")
        turned, left, right, factor = (state[f"optimizer.state.{kind}.{name}"].squeeze() for kind in kinds)
        torch.testing.assert_close(left @ turned @ right.mT, mean, rtol=1e-4, atol=1e-5 * float(mean.abs().max()))
        inside = left.mT @ factor @ left
        assert float((inside - inside.diagonal().diag()).norm()) < 1e-4 * float(factor.norm())
