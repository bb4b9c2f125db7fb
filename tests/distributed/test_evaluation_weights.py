"""Schedule-free on every layout: what is evaluated and exported is the average, evaluations leave no trace, numbers resume."""

import json
from pathlib import Path

import pytest
import torch

from megatron_opt.export import families, names
from megatron_opt.export.reading import Checkpoint
from tests.distributed import cases as c
from tests.distributed import recording
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_matrices
from tests.distributed.pool import Pool, Run

STEPS, STOP = 6, 4
OWN = "weights-"  # how the runs' names begin: other files of the session's pool have a `whole` too
FREE = [*c.DENSE, *"--num-layers 2 --optimizer schedule_free".split(), *c.CONSTANT]
PRODIGY = [*c.DENSE, *"--num-layers 2 --optimizer prodigy --lr 1 --min-lr 0.1 --prodigy-d0 1e-3".split()]
OVERLAP = Layout.of("dp2-overlap", 2, distopt=True, more=("--overlap-param-gather", "--overlap-grad-reduce"))


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    evaluated = ["--eval-interval", "2", "--eval-iters", "1", "--valid-data-path", pool.data]

    def made(name: str, model: list[str], layout: Layout, *flags: str, **options: object) -> Case:
        return case([*model, *flags], [], layout, f"{OWN}{name}", steps=STEPS, hook="evaluated", options=options)

    found = pool.run(
        [
            made("one", FREE, c.ONE, *evaluated),
            made("apart", FREE, c.TP2_DP2_DIST, *evaluated),
            made("seen", FREE, OVERLAP, "--bf16", *evaluated),
            made("plain", FREE, OVERLAP, "--bf16"),
            made("stopped", FREE, c.TP2, "--bf16", save="free", interval=STOP, stop=STOP),
            made("whole", FREE, c.TP2, "--bf16"),
            made("distance-stopped", PRODIGY, c.TP2, save="distance", interval=STOP, stop=STOP),
            made("distance-whole", PRODIGY, c.TP2),
        ]
    )
    then = [
        made("resumed", FREE, c.TP2, "--bf16", load="free"),
        made("distance-resumed", PRODIGY, c.TP2, load="distance"),
    ]
    return {name.removeprefix(OWN): run for name, run in (found | pool.run(then)).items()}


def losses(pool: Pool, name: str) -> dict[int, float]:
    (path,) = Path(pool.home).glob(f"*/average-{OWN}{name}/metrics.jsonl")
    rows = map(json.loads, path.read_text().splitlines())
    return {row["iteration"]: row["loss"] for row in rows if row["kind"] == "eval"}


def evaluated(run: Run) -> dict[str, torch.Tensor]:
    return recording.whole([block for rank in run.ranks for block in rank["evaluated"]])


def average(run: Run) -> dict[str, torch.Tensor]:
    return {name: weight - run.state["lead"][name] for name, weight in run.weights.items()}


@pytest.mark.parametrize("name", ["one", "apart", "seen"])
def test_what_is_evaluated_is_the_average(runs: dict[str, Run], name: str) -> None:
    assert_same_matrices(evaluated(runs[name]), average(runs[name]), 1e-6)
    assert all(rank["published"] for rank in runs[name].ranks)
    assert any(not torch.equal(x, runs[name].weights[n]) for n, x in evaluated(runs[name]).items())


def test_a_layout_repeats_one_process(runs: dict[str, Run], pool: Pool) -> None:
    mine, whole = losses(pool, "apart"), losses(pool, "one")
    assert sorted(whole) == [2, 4, 6] and mine == pytest.approx(whole, rel=1e-5)


def test_an_evaluation_leaves_no_trace(runs: dict[str, Run]) -> None:
    """bf16 weights gathered during the next forward pass."""
    assert runs["seen"].losses == runs["plain"].losses
    assert all(torch.equal(w, runs["plain"].weights[n]) for n, w in runs["seen"].weights.items())


@pytest.mark.parametrize("name", ["", "distance-"])
def test_a_resumed_run_is_the_whole_one(runs: dict[str, Run], name: str) -> None:
    """Numbers of the whole rule too: the sum of weights of the average, Prodigy's d."""
    resumed, whole = runs[f"{name}resumed"], runs[f"{name}whole"]
    assert resumed.losses == whole.losses[STOP:]
    assert all(torch.equal(resumed.weights[n], w) for n, w in whole.weights.items())
    numbers = [rank["numbers"] for run in (resumed, whole) for rank in run.ranks]
    assert numbers == [numbers[0]] * len(numbers) and all(numbers[0])


def test_the_average_is_read_as_a_model(runs: dict[str, Run], pool: Pool) -> None:
    folder, saved = Path(pool.home) / "checkpoints" / "free", average(runs["stopped"])
    free, raw = Checkpoint(folder), Checkpoint(folder, weights="raw")
    assert free.averages is not None and free.averages.leads and raw.averages is None
    for parameter in names.parameters(families.spec_of(free.args)):
        parts = [saved[name] for name in saved if name == parameter.name or name.startswith(f"{parameter.name}.")]
        actual = free(parameter.name)
        assert actual.shape == parameter.shape and actual.dtype == torch.bfloat16
        assert "norm" in parameter.name or not torch.equal(actual, raw(parameter.name))
        wanted = float(sum(part.float().bfloat16().double().sum() for part in parts))
        assert actual.double().sum() == pytest.approx(wanted, rel=1e-6, abs=1e-3)
