"""A study of real training: rates carried by µP, data read twice, a batch that grows; the report from what runs left (slow)."""

import pytest

from megatron_opt.study import cli
from megatron_opt.study.dataset import from_store
from megatron_opt.study.fits.transfer import transfer_of
from megatron_opt.study.fits.wall_clock import reached, step_ratios
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Store

STUDY = """\
name: real
sequence_length: 32
tokens_per_parameter: 1
models:
  p: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
  w: {num_layers: 1, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4}
data: {tokenizer: tokenizer.model, train: train, valid: valid}
defaults: {batch_size: 8, warmup: 0.1}
optimizers:
  adamw: {grid: {lr: [0.004, 0.016]}}
  lion: {start: {batch_ramp: "0:4 0.5:8"}, grid: {lr: [0.001, 0.004]}}
phases:
  - {kind: transfer, proxy: p@1x, regimes: [w@1x]}
  - {kind: transfer, proxy: p@1x, regimes: [w@2x, w@2x-2ep], optimizers: [adamw], parametrizations: [mup], sweep: false}
executor: {kind: local, jobs: 1, ranks: 1, retries: 0}
flags: {eval_iters: 2, log_interval: 5}
eval_points: 4
checkpoints: 1
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_of_transfer_epochs_and_a_growing_batch(real_data):
    (real_data / "s.yaml").write_text(STUDY)
    output = real_data / "out"
    assert cli.main(["run", str(real_data / "s.yaml"), "--output", str(output)], "study") == 0
    with Store(output / "study.sqlite") as store:
        dataset = from_store(store)
        curves = {record.id: store.curve(record.id) for record in dataset.records}
    dataset.curve = curves.__getitem__
    assert len(dataset.records) >= 14 and all(record.status == "completed" for record in dataset.records)
    assert all(record.results["tokens"] == record.tokens for record in dataset.records)

    # Both read the same sequences for an epoch, to the last bit of the loss, and others from there on.
    (once,) = [record for record in dataset.records if record.regime == Regime("w", 2)]
    (twice,) = [record for record in dataset.records if record.regime == Regime("w", 2, 2)]
    assert once.hyper == twice.hyper and once.tokens == twice.tokens == 2 * twice.unique_tokens
    pairs = list(zip(curves[once.id].train, curves[twice.id].train, strict=True))
    first = [(a["loss"], b["loss"]) for a, b in pairs if a["tokens"] <= twice.unique_tokens]
    second = [(a["loss"], b["loss"]) for a, b in pairs if a["tokens"] > twice.unique_tokens]
    assert len(first) == len(second) > 20
    assert all(a == b for a, b in first) and all(a != b for a, b in second)

    grown = [record for record in dataset.records if record.optimizer == "lion" and record.regime == Regime("w", 1)]
    steps = {record.results["iterations"] for record in grown}
    assert steps == {240}  # of 1,280 samples, half in batches of 4

    found = transfer_of(dataset)
    assert {(row.optimizer, row.parametrization) for row in found.rows} >= {
        (n, k) for n in ("adamw", "lion") for k in ("mup", "standard")
    }
    assert {row.width for row in found.rows} == {64}
    mup = next(r for r in dataset.records if r.regime == Regime("w", 1) and "mup" in r.hyper and r.optimizer == "adamw")
    plain = next(
        r
        for r in dataset.records
        if r.hyper == {k: v for k, v in mup.hyper.items() if k != "mup"} and r.regime == mup.regime
    )
    assert plain.loss != mup.loss
    assert step_ratios(dataset).keys() == {("lion", Regime("p", 1)), ("lion", Regime("w", 1))}
    assert {row.optimizer for row in reached(dataset)} == {"lion"}
    page = (output / "report" / "index.html").read_text()
    assert "Transfer over width" in page and "Tokens and time" in page and "-2ep" in page
