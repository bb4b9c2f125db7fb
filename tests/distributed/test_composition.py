"""Muon with what Megatron composes it with, against one process; matrices that cannot be used; ranks that disagree."""

import pytest
import torch

from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_curve, assert_same_state
from tests.distributed.pool import Pool, Run

STEPS = 8
SHARED_EXPERTS = [*c.MOE, "--moe-shared-expert-intermediate-size", "40"]
PER_TOKEN = [*c.DENSE, "--calculate-per-token-loss"]
COMPOSED = {
    "overlap-grad": (c.DENSE, c.DP2_DIST, ["--overlap-grad-reduce"]),
    "overlap-both": (c.DENSE, c.DP2_DIST, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "overlap-vpp": (c.DENSE, Layout.of("pp2-vpp2-dp2-distopt", 4, pp=2, vpp=2, distopt=True),
                    ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "per-token": (PER_TOKEN, c.DP2_DIST, []),
    "owner": (c.DENSE, c.TP2_DP2_DIST, ["--matrix-mode", "owner"]),
    "sharded": (c.DENSE, c.TP2_DP2_DIST, ["--matrix-mode", "sharded"]),
    "small-buckets": (c.DENSE, c.TP2_DP2, ["--exchange-bucket-mb", "0.01"]),
    "heads": ([*c.GQA, "--split-heads"], c.TP2, []),
    "shared-experts": (SHARED_EXPERTS, c.EP2, []),
    "frozen": (c.DENSE, c.DP2_DIST, []),
}  # fmt: skip
CLEAN = {
    "dense": c.DENSE, "per-token": PER_TOKEN, "heads": [*c.GQA, "--split-heads"], "shared-experts": SHARED_EXPERTS,
    "frozen": c.DENSE,
}  # fmt: skip
HIT = "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.layers.1.input_layernorm.weight"
POISON = {"nan": (HIT, "nan"), "inf": (HIT, "inf"), "zero": (HIT, "zero"), "norm": (NORM, "nan")}


def _poisoned(name: str, matrix: str, value: str, *flags: str) -> Case:
    options = {"matrix": matrix, "value": value, "step": 2, "rank": 1}
    return case(c.DENSE, [*c.MUON, *flags], c.TP2, name, steps=2, hook="poison", options=options)


def _hook(name: str) -> dict[str, object]:
    return {"hook": "freeze", "options": {"frozen": "mlp"}} if name == "frozen" else {}


CASES = [
    *(case(model, [*c.MUON, *more], layout, name, steps=STEPS, **_hook(name))
      for name, (model, layout, more) in COMPOSED.items()),
    *(case(model, c.MUON, c.ONE, f"one-{name}", steps=STEPS, **_hook(name)) for name, model in CLEAN.items()),
    *(case(c.DENSE, [*c.MUON, "--bf16"], layout, f"bf16-{layout.name}", steps=STEPS)
      for layout in (c.ONE, c.DP2, c.DP2_DIST)),
    case(c.DENSE, c.MUON, c.TP2, "clean", steps=2),
    case(c.DENSE, c.MUON, c.TP2, "clean-1", steps=1),
    *(_poisoned(name, *what) for name, what in POISON.items()),
    _poisoned("abort", HIT, "nan", "--on-bad-matrix", "abort"),
    case(c.DENSE, c.MUON, c.DP2_DIST, "skew", steps=2, hook="skew"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run(CASES)


@pytest.mark.parametrize("name", COMPOSED)
def test_composition_repeats_one_process(runs: dict[str, Run], name: str) -> None:
    reference = runs[f"one-{name}" if name in CLEAN else "one-dense"]
    assert_same_curve(runs[name], reference, steps=STEPS)
    assert_same_state(runs[name], reference)


def test_frozen_parameters_have_neither_owner_nor_state(runs: dict[str, Run]) -> None:
    assert not [name for name in runs["frozen"].weights if "mlp" in name]
    assert not [name for name in runs["frozen"].state["momentum_buffer"] if "mlp" in name]


def test_bf16_with_main_copies(runs: dict[str, Run]) -> None:
    one, sharded = runs["bf16-one"], runs["bf16-dp2-distopt"]
    assert runs["bf16-dp2"].losses == sharded.losses  # the distributed optimizer changes nothing
    assert sharded.losses == pytest.approx(one.losses, rel=1e-2)
    assert sharded.losses == pytest.approx(runs["one-dense"].losses, rel=2e-2)
    assert any(value.float().bfloat16().double().ne(value).any() for value in sharded.weights.values()), "copies are fp32"


@pytest.mark.parametrize("name", POISON)
def test_a_bad_matrix_is_left_alone_and_harms_no_neighbour(runs: dict[str, Run], name: str) -> None:
    matrix, value = POISON[name]
    run, clean, before = runs[name], runs["clean"], runs["clean-1"].weights
    assert run.error is None
    for rank in run.ranks:
        assert rank["skipped"] == ({} if value == "zero" else {matrix: 1})
    after, wanted = run.weights, clean.weights
    assert torch.equal(after[matrix], before[matrix])
    for other in after:
        if other != matrix and run.state["momentum_buffer"].get(other) is not None:
            assert torch.equal(after[other], wanted[other]), other
        assert after[other].isfinite().all()


def test_abort_says_which_matrix_on_every_rank(runs: dict[str, Run]) -> None:
    for said in runs["abort"].user_errors:
        assert said and f"step 2: the gradient of {HIT} is not finite" in said


def test_ranks_that_disagree_on_the_plan_are_told_at_start(runs: dict[str, Run]) -> None:
    for said in runs["skew"].user_errors:
        assert said and "ranks disagree on the optimizer plan of stage 0" in said
