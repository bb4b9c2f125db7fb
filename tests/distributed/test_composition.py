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
    "overlap-instances": (c.DENSE, c.DP2X2, c.OVERLAP),
    "per-token": (PER_TOKEN, c.DP2_DIST, []),
    "group-overlap": (c.DENSE, c.TP2_DP2_DIST, ["--matrix-mode", "group", "--overlap-grad-reduce", "--overlap-param-gather"]),
    "group-small-buckets": (c.DENSE, c.TP2_DP2, ["--matrix-mode", "group", "--exchange-bucket-mb", "0.01"]),
    "small-buckets": (c.DENSE, c.TP2_DP2, ["--exchange-bucket-mb", "0.01"]),
    "heads": ([*c.GQA, "--split-heads"], c.TP2, []),
    "shared-experts": (SHARED_EXPERTS, c.EP2, []),
    "frozen": (c.DENSE, c.DP2_DIST, []),
    "one-norm": (c.DENSE, c.DP4_DIST, []),
    "one-matrix": (c.DENSE, c.PP2, []),
    "no-gradient": (c.DENSE, c.TP2_DP2_DIST, ["--matrix-mode", "group"]),
}  # fmt: skip
CLEAN = {
    "dense": c.DENSE, "per-token": PER_TOKEN, "heads": [*c.GQA, "--split-heads"], "shared-experts": SHARED_EXPERTS,
    "frozen": c.DENSE, "one-norm": c.DENSE, "one-matrix": c.DENSE, "no-gradient": c.DENSE,
}  # fmt: skip
HIT = "decoder.layers.0.mlp.linear_fc2.weight"
NORM = "decoder.layers.1.input_layernorm.weight"
POISON = {"nan": (HIT, "nan"), "inf": (HIT, "inf"), "zero": (HIT, "zero"), "norm": (NORM, "nan")}


def _poisoned(name: str, matrix: str, value: str, *flags: str) -> Case:
    options = {"matrix": matrix, "value": value, "step": 2, "rank": 1}
    return case(c.DENSE, [*c.MUON, *flags], c.TP2, name, steps=2, hook="poison", options=options)


HOOKS: dict[str, dict[str, object]] = {
    "frozen": {"hook": "freeze", "options": {"frozen": "mlp"}},
    # 32 elements, all of them on one of four ranks; one matrix, on one of two stages
    "one-norm": {"hook": "freeze", "options": {"kept": "final_layernorm"}},
    "one-matrix": {"hook": "freeze", "options": {"kept": "layers.0.self_attention.linear_proj"}},
    "no-gradient": {"hook": "poison", "options": {"matrix": HIT, "value": "zero", "step": 3}},
}


def _rule(name: str) -> list[str]:
    return c.ADAMW if name == "one-norm" else c.MUON


REFRESH = ["--soap-precondition-frequency", "2"]  # within the three steps
WORK_LAYOUTS = [c.ONE, c.TP2, c.DP2_DIST, c.TP2_DP2_DIST]
WORK = [
    case(c.DENSE, [*optimizer, "--matrix-mode", mode], layout, f"work-{kind}-{mode}-{layout.name}", steps=3, hook="work")
    for kind, optimizer in (
        ("muon", c.MUON), ("soap", [*c.SOAP, *REFRESH]), ("blocks", [*c.SOAP_BLOCKS, *REFRESH]),
        ("one-sided", [*c.SOAP_ONE_SIDED, *REFRESH]),
    )
    for mode in ("owner", "sharded", "group")
    for layout in WORK_LAYOUTS
] + [
    case(c.DENSE, [*c.SOAP_STRIPS, "--matrix-mode", mode], layout, f"work-strips-{mode}-{layout.name}", steps=3, hook="work")
    for mode in ("sharded", "group")
    for layout in (c.ONE, c.TP2_DP2_DIST)
] + [
    case(c.DENSE, [*optimizer, "--matrix-mode", "sharded"], layout, f"work-{kind}-sharded-{layout.name}", steps=3, hook="work")
    for kind, optimizer in (("normuon", c.NORMUON), ("muon_h", c.MUON_H), ("soap_h", c.SOAP_H))
    for layout in (c.ONE, c.TP2_DP2_DIST)
] + [
    case(c.DENSE, [*c.MUON, "--matrix-mode", "owner"], layout, f"work-muon-owner-{layout.name}", steps=3, hook="work")
    for layout in (c.DP2X2, c.DP2X2_WITHIN)
]  # fmt: skip
CASES = [
    *(case(model, [*_rule(name), *more], layout, name, steps=STEPS, **HOOKS.get(name, {}))
      for name, (model, layout, more) in COMPOSED.items()),
    *(case(model, _rule(name), c.ONE, f"one-{name}", steps=STEPS, **HOOKS.get(name, {}))
      for name, model in CLEAN.items()),
    *(case(c.DENSE, [*c.MUON, "--bf16"], layout, f"bf16-{layout.name}", steps=STEPS)
      for layout in (c.ONE, c.DP2, c.DP2_DIST, c.DP2X2)),
    case(c.DENSE, c.MUON, c.TP2, "clean", steps=2),
    case(c.DENSE, c.MUON, c.TP2, "clean-1", steps=1),
    *(_poisoned(name, *what) for name, what in POISON.items()),
    _poisoned("abort", HIT, "nan", "--on-bad-matrix", "abort"),
    case(c.DENSE, c.MUON, c.DP2_DIST, "skew", steps=2, hook="skew"),
    case(c.DENSE, c.MUON, c.PP2, "undeclared", steps=2, hook="undeclared"),
    *WORK,
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
    assert runs["bf16-dp2x2"].losses == pytest.approx(one.losses, rel=1e-2)
    assert sharded.losses == pytest.approx(runs["one-dense"].losses, rel=2e-2)
    assert any(value.float().bfloat16().double().ne(value).any() for value in sharded.weights.values()), (
        "copies are fp32"
    )


@pytest.mark.parametrize("name", POISON)
def test_a_bad_matrix_is_left_alone_and_harms_no_neighbour(runs: dict[str, Run], name: str) -> None:
    matrix, value = POISON[name]
    run, clean, before = runs[name], runs["clean"], runs["clean-1"].weights
    assert run.error is None
    for rank in run.ranks:
        assert rank["skipped"] == ({} if value == "zero" else {matrix: 1})
    after, wanted = run.weights, clean.weights
    assert torch.equal(after[matrix], before[matrix])
    neighbours = run.state["momentum_buffer"].keys() - {matrix}
    assert len(neighbours) > 5 and all(torch.equal(after[other], wanted[other]) for other in neighbours)
    assert all(value.isfinite().all() for value in after.values())


def test_abort_says_which_matrix_on_every_rank(runs: dict[str, Run]) -> None:
    for said in runs["abort"].user_errors:
        assert said and f"step 2: the gradient of {HIT} is not finite" in said


def test_ranks_that_disagree_on_the_plan_are_told_at_start(runs: dict[str, Run]) -> None:
    for said in runs["skew"].user_errors:
        assert said and "ranks disagree on the optimizer plan of stage 0" in said


def test_what_one_stage_alone_refuses_every_stage_refuses(runs: dict[str, Run]) -> None:
    assert runs["undeclared"].user_errors == ["no line declares the layer `odd`"] * 2


@pytest.mark.parametrize("name", [each.name for each in WORK])
def test_no_work_is_done_twice(runs: dict[str, Run], name: str) -> None:
    """Counted FLOPs, summed over ranks, are one process's (an instance's, with owners within each); state is the plan's."""
    run = runs[name]
    one = runs["-".join([*name.split("-")[: 3 + name.startswith("work-one-sided")], "one"])]
    assert run.error is None
    computed = 2 if run.case.layout is c.DP2X2_WITHIN else 1
    counted = sum(rank["flops"] for rank in run.ranks) / computed
    assert counted == pytest.approx(one.ranks[0]["flops"], rel=0.01) and counted > 0
    for rank in run.ranks:
        assert rank["held"] == pytest.approx(rank["planned"])
    if name.startswith("work-muon"):
        planned = sum(sum(rank["planned_flops"]) for rank in run.ranks) / computed
        assert counted == pytest.approx(2 * planned, rel=0.01)


@pytest.mark.parametrize("mode", ["owner", "group"])
def test_a_rank_killed_inside_the_step_leaves_the_last_checkpoint_intact(pool: Pool, mode: str) -> None:
    flags = [*c.MUON, "--matrix-mode", mode]
    whole = case(c.DENSE, flags, c.TP2, f"unharmed-{mode}", steps=4)
    options = {"save": f"killed-{mode}", "interval": 2, "step": 3}
    found = pool.run([whole, case(c.DENSE, flags, c.TP2, f"killed-{mode}", steps=4, hook="die", options=options)])
    survivor, killed = found[f"killed-{mode}"].ranks
    assert killed["killed"] and len(killed["losses"]) == 2
    assert "error" in survivor and survivor["seconds"] < 60
    again = case(c.DENSE, flags, c.TP2, f"again-{mode}", steps=4, hook="checkpoint", options={"load": f"killed-{mode}"})
    resumed, unharmed = pool.run([again])[f"again-{mode}"], found[f"unharmed-{mode}"]
    assert resumed.losses == unharmed.losses[2:]
    assert resumed.grad_norms == unharmed.grad_norms[2:]
