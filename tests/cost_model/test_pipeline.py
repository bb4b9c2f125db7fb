"""Uneven pipelines: Megatron's flags, cuts by weight, and fill and drain against a simulated schedule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opt.cost_model.cluster import load
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.pipeline import balanced, parse_layout, split_flags, split_of
from megatron_opt.cost_model.step import pipeline_seconds, stage_seconds
from megatron_opt.errors import UserError


def test_megatrons_layout_strings() -> None:
    """The layout of NVIDIA's DeepSeek-V3 recipe: 61 layers on 32 virtual stages, the last two without."""
    assert parse_layout("Et*3|(tt|)*29m|L") == (3, *[2] * 29, 0, 0)
    assert parse_layout("E t t | t , t L") == (2, 2)
    for text in ("tt|tt", "Et*3|(xx|)*2L", "E(tt|L", "Et|L)"):
        with pytest.raises(UserError, match="pipeline-model-parallel-layout"):
            parse_layout(text)


@pytest.mark.parametrize(
    ("words", "layers", "pp", "virtual", "split"),
    [
        ("", 32, 4, 1, ()),
        ("--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2", 61, 16, 1, (3, *[4] * 14, 2)),
        ("--decoder-last-pipeline-num-layers 5", 61, 8, 1, (*[8] * 7, 5)),
        ("--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 2", 12, 4, 2, (1, 2, 2, 1) * 2),
        (
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
            126, 16, 8, (0, *[1] * 126, 0),
        ),
        ("--account-for-loss-in-pipeline-split", 31, 4, 1, (8, 8, 8, 7)),
    ],
)  # fmt: skip
def test_uneven_flags_cut_as_megatron_does(words: str, layers: int, pp: int, virtual: int, split: tuple) -> None:
    assert split_of(parse(words.split())[0], layers, pp, virtual) == split


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--decoder-first-pipeline-num-layers 3", "leave 29, which 3 stages do not divide"),
        ("--decoder-first-pipeline-num-layers 40", "do not divide"),
        ("--account-for-loss-in-pipeline-split", "do not divide"),
        ("--decoder-first-pipeline-num-layers 5 --account-for-loss-in-pipeline-split", "give one of the two"),
        ("--pipeline-model-parallel-layout Et*3|tL", "has 4 layers on 2 stages"),
    ],
)
def test_cuts_that_megatron_refuses_name_their_flag(words: str, message: str) -> None:
    flags, _ = parse(f"--preset llama-7b --pipeline-model-parallel-size 4 {words}".split())
    with pytest.raises(UserError, match=message) as error:
        Layout.of(flags, 4, Model.of(flags))
    assert "--" in str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40),
    st.floats(0.0, 3.0),
    st.integers(1, 8),
)
def test_cuts_by_weight_are_the_best_there_are(weights: list[float], head: float, parts: int) -> None:
    """Against dynamic programming over all cuts."""
    found = balanced(weights, (0.0, head), parts)
    assert sum(found) == len(weights) and len(found) == parts

    def loads(sizes: tuple[int, ...]) -> list[float]:
        edges = [sum(sizes[:i]) for i in range(parts + 1)]
        return [sum(weights[a:b]) + (head if i == parts - 1 else 0.0) for i, (a, b) in enumerate(zip(edges, edges[1:]))]

    best = [sum(weights[:n]) for n in range(len(weights) + 1)]
    for part in range(1, parts):
        last = head if part == parts - 1 else 0.0
        best = [min(max(best[a], sum(weights[a:b]) + last) for a in range(b + 1)) for b in range(len(weights) + 1)]
    expected = best[-1] if parts > 1 else sum(weights) + head
    assert max(loads(found)) == pytest.approx(expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=24).filter(lambda sizes: sum(sizes) > 0))
def test_flags_of_a_cut_give_the_cut_back(sizes: list[int]) -> None:
    words = split_flags(sizes, len(sizes), 1)
    flags, _ = parse(words.split())
    back = split_of(flags, sum(sizes), len(sizes), 1)
    assert back == tuple(sizes) or (back == () and len(set(sizes)) == 1)


def simulated(stages: list[float], microbatches: int) -> float:
    """Seconds until the last of `microbatches` has left a pipeline whose stages take one at a time."""
    free = [0.0] * len(stages)
    at = 0.0
    for _ in range(microbatches):
        at = 0.0
        for stage, seconds in enumerate(stages):
            at = free[stage] = max(at, free[stage]) + seconds
    return at


@pytest.mark.parametrize("uneven", ["", "--decoder-first-pipeline-num-layers 2 --decoder-last-pipeline-num-layers 6"])
def test_fill_and_drain_are_those_of_a_simulated_pipeline(uneven: str) -> None:
    words = f"--preset llama-7b --pipeline-model-parallel-size 4 --global-batch-size 32 {uneven}"
    flags, _ = parse(words.split())
    model = Model.of(flags)
    layout = Layout.of(flags, 4, model)
    stages = stage_seconds(model, layout, load("h100"))
    assert sum(pipeline_seconds(model, layout, load("h100"))) == pytest.approx(simulated(stages, layout.microbatches))
    layers = [last - first for first, last in layout.stages(model)]
    assert layers == ([2, 12, 12, 6] if uneven else [8] * 4)
