"""One conversion by whole runs on one rank: Megatron's own Adam to SOAP, weights and moments; the other layouts are slow."""

from pathlib import Path

import pytest
import torch

from tests.migrate.runs import ADAM, STOP, convert, launch, losses, tensors, weights

pytestmark = pytest.mark.timeout(300)


def test_a_warm_soap_has_megatrons_weights_and_moments(tmp_path: Path) -> None:
    train = ["--optimizer", "adam", *ADAM, "--train-iters", str(STOP), "--save", str(tmp_path / "adam")]
    launch("megatron_opt.pretrain", 1, [*train, "--save-interval", str(STOP)], tmp_path)
    said = convert(tmp_path, "adam", "soap", 1, "--optimizer", "soap", "--soap-block-size", "0")
    assert "--lr-warmup-iters" in said and "the schedule counts from here" in said
    before, after = weights(tmp_path / "adam"), weights(tmp_path / "soap")
    assert before.keys() == after.keys() and len(before) > 5
    assert all(torch.equal(after[key], before[key]) for key in before)
    for kind in ("exp_avg", "exp_avg_sq"):  # as Adam left them: the first gradient's bases will turn them
        stacked = tensors(tmp_path / "adam", f"{kind}.")
        (whole,) = [value for key, value in stacked.items() if key.endswith("linear_proj.weight")]  # (layers, 32, 32)
        state = tensors(tmp_path / "soap", "linear_proj.weight")
        for layer, value in enumerate(whole):
            name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
            torch.testing.assert_close(state[f"optimizer.state.{kind}.{name}"], value, rtol=1e-6, atol=0)
            assert state[f"optimizer.state.gg_0_0.{name}"].any() and not state[f"optimizer.state.ready.{name}"].any()
    train = ["--optimizer", "soap", "--soap-block-size", "0", "--load", str(tmp_path / "soap")]
    going_on = losses(launch("megatron_opt.pretrain", 1, [*train, "--override-opt_param-scheduler"], tmp_path))
    assert sorted(going_on) == list(range(STOP + 1, 17)) and max(going_on.values()) < 1.02 * going_on[STOP + 1]
