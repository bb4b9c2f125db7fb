"""The moving average of weights: the formula in float64, on every layout, in checkpoints; evaluations that leave no trace."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.export import families, names
from megatron_opt.export.reading import Checkpoint
from tests.distributed import cases as c
from tests.distributed import recording
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_matrices
from tests.distributed.pool import Pool, Run

STEPS, STOP = 6, 4
SMALL = [*c.DENSE, "--num-layers", "2"]
EMA = ["--ema-decay", "0.75"]
MODELS = {
    "dense": [*SMALL, *c.MUON],
    "tied": [*c.TIED, "--num-layers", "2", *c.ADAMW],
    "moe": [*c.MOE, *c.MUON],
    "bf16": [*SMALL, *c.MUON, "--bf16"],
}
OVERLAP = Layout.of("dp2-overlap", 2, distopt=True, more=("--overlap-param-gather", "--overlap-grad-reduce"))
LAYOUTS = [("dense", c.TP2_DP2_DIST), ("tied", c.PP2), ("moe", c.EP2_DIST)]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    evaluated = ["--eval-interval", "2", "--eval-iters", "1", "--valid-data-path", pool.data]

    def made(name: str, model: str, layout: Layout, *flags: str, **options: object) -> Case:
        given = [*MODELS[model], *flags] if "plain" in name else [*MODELS[model], *evaluated, *flags]
        return case(given, [], layout, name, steps=STEPS, hook="average", options=options)

    first = [made(f"{name}-{layout.name}", name, layout, *EMA) for name, layout in LAYOUTS]
    first += [made(f"{name}-one", name, c.ONE, *EMA) for name, _ in LAYOUTS]
    first += [
        made("short", "dense", c.ONE, "--ema-decay", "1e-6"),
        made("long", "dense", c.ONE, "--ema-decay", "0.999999"),
    ]
    first += [made("seen", "bf16", OVERLAP, *EMA), made("plain", "bf16", OVERLAP)]
    first += [made("stopped", "bf16", c.TP2_DP2_DIST, *EMA, save="averaged", interval=STOP, stop=STOP)]
    first += [
        made("whole", "bf16", c.TP2_DP2_DIST, *EMA),
        made("without-plain", "bf16", c.ONE, save="raw", interval=STOP, stop=STOP),
    ]
    found = pool.run(first)
    then = [
        made("resumed", "bf16", c.TP2_DP2_DIST, *EMA, load="averaged"),
        made("resharded", "bf16", c.PP2, *EMA, load="averaged"),
    ]
    then += [made("begun", "bf16", c.ONE, *EMA, "--accept-changed", "ema-decay", load="raw")]
    return found | pool.run(then)


def losses(pool: Pool, name: str, split: str) -> dict[int, float]:
    (path,) = Path(pool.home).glob(f"*/average-{name}/metrics.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return {row["iteration"]: row["loss"] for row in rows if row["kind"] == "eval" and row["split"] == split}


def average(run: Run, what: str = "average") -> dict[str, Tensor]:
    return recording.whole([block for rank in run.ranks for block in rank[what]])


@pytest.mark.parametrize("name", [f"{model}-{layout.name}" for model, layout in LAYOUTS] + ["dense-one"])
def test_the_average_is_that_kept_by_hand(runs: dict[str, Run], name: str) -> None:
    found = average(runs[name])
    assert_same_matrices(found, average(runs[name], "by_hand"), 1e-6)
    assert any(not torch.equal(found[n], w) for n, w in runs[name].weights.items())


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=lambda value: getattr(value, "name", value))
def test_a_layout_repeats_one_process(runs: dict[str, Run], pool: Pool, name: str, layout: Layout) -> None:
    assert_same_matrices(average(runs[f"{name}-{layout.name}"]), average(runs[f"{name}-one"]), 1e-4)
    for split in ("valid", "valid_ema"):
        mine, whole = losses(pool, f"{name}-{layout.name}", split), losses(pool, f"{name}-one", split)
        assert sorted(whole) == [2, 4, 6] and mine == pytest.approx(whole, rel=1e-5)
    assert losses(pool, f"{name}-one", "valid") != losses(pool, f"{name}-one", "valid_ema")


def test_what_is_evaluated_is_the_average(runs: dict[str, Run], pool: Pool) -> None:
    """One that forgets at once is the weights; one that forgets nothing is the first step's."""
    assert losses(pool, "short", "valid_ema") == pytest.approx(losses(pool, "short", "valid"), rel=1e-6)
    values = list(losses(pool, "long", "valid_ema").values())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5) and values[-1] > losses(pool, "long", "valid")[6] + 1e-3
    (path,) = Path(pool.home).glob("*/average-long/results.json")
    assert json.loads(path.read_text())["final_valid_ema_loss"] == values[-1]


def test_an_evaluation_leaves_no_trace(runs: dict[str, Run]) -> None:
    """bf16 weights gathered during the next forward pass."""
    assert runs["seen"].losses == runs["plain"].losses
    assert all(torch.equal(w, runs["plain"].weights[n]) for n, w in runs["seen"].weights.items())


def test_a_resumed_run_is_the_whole_one(runs: dict[str, Run], pool: Pool) -> None:
    assert runs["resumed"].losses == runs["whole"].losses[STOP:]
    found, wanted = average(runs["resumed"]), average(runs["whole"])
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert losses(pool, "resumed", "valid_ema")[STEPS] == losses(pool, "whole", "valid_ema")[STEPS]


def test_a_checkpoint_goes_on_on_another_layout(runs: dict[str, Run]) -> None:
    loaded, saved = average(runs["resharded"], "loaded_average"), average(runs["stopped"])
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_the_average_is_read_as_a_model(runs: dict[str, Run], pool: Pool) -> None:
    """As export, generate and eval read it: whole parameters, and shards of three-dimensional layouts' matrices."""
    folder, saved = Path(pool.home) / "checkpoints" / "averaged", average(runs["stopped"])
    raw, averaged = Checkpoint(folder), Checkpoint(folder, weights="ema")
    with pytest.raises(UserError, match=r"--weights ema: .* without --ema-decay"):
        Checkpoint(folder.with_name("raw"), weights="ema")
    for parameter in names.parameters(families.spec_of(raw.args)):
        parts = [saved[name] for name in saved if name == parameter.name or name.startswith(f"{parameter.name}.")]
        actual = averaged(parameter.name)
        assert actual.shape == parameter.shape and actual.dtype == torch.bfloat16
        assert "norm" in parameter.name or not torch.equal(actual, raw(parameter.name))  # norms near 1 may round alike
        assert actual.double().sum() == pytest.approx(
            float(sum(part.bfloat16().double().sum() for part in parts)), rel=1e-9
        )
    first = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert torch.equal(averaged(first)[8:16].float(), saved[f"{first}.k"][:8].bfloat16().float())
    up = "decoder.layers.0.mlp.linear_fc1.weight"
    whole = averaged(up)
    for rank in (0, 1):
        shard = torch.cat([part.chunk(2)[rank] for part in whole.chunk(2)])
        assert averaged.averages is not None and torch.equal(averaged.averages(up, shard, rank, 2, 0), shard)


def test_without_one_in_the_checkpoint_it_begins_at_the_weights(runs: dict[str, Run]) -> None:
    loaded, raw = average(runs["begun"], "loaded_average"), runs["without-plain"].weights
    assert all(torch.equal(loaded[name], value) for name, value in raw.items())
    assert any(not torch.equal(average(runs["begun"])[name], value) for name, value in raw.items())
