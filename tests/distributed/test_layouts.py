"""AdamW, Muon and SOAP repeat one process's run on every layout."""

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import Layout, case
from tests.distributed.compare import assert_same_curve, assert_same_state
from tests.distributed.pool import Pool, Run

OPTIMIZERS = {"adamw": c.ADAMW, "muon": c.MUON, "soap": c.SOAP}
DENSE_LAYOUTS = [
    c.TP2,
    c.PP2,
    c.VPP2,
    c.DP2,
    c.DP2_DIST,
    c.SP2,
    c.TP2_PP2,
    c.TP2_DP2,
    c.TP2_DP2_DIST,
    c.TP4,
    c.DP4_DIST,
    Layout.of("pp2-dp2-distopt", 4, pp=2, distopt=True),
    Layout.of("pp2-uneven", 2, pp=2, more=("--decoder-first-pipeline-num-layers=1",)),
]
TP2_EP2 = Layout.of("tp2-ep2", 4, tp=2, ep=2, etp=1, sp=True)
EP2_DP2_DIST = Layout.of("ep2-dp2-distopt", 4, ep=2, distopt=True)
BOTH, ALL = ("adamw", "muon"), ("adamw", "muon", "soap")
MODELS = {
    "dense": (c.DENSE, ALL, DENSE_LAYOUTS),
    "gqa": (c.GQA, BOTH, [c.TP2, c.TP4]),
    "tied": (c.TIED, ALL, [c.TP2, c.PP2, c.VPP2, c.DP2_DIST, c.TP2_PP2]),
    "gpt2": (c.GPT2, BOTH, [c.TP2, c.TP2_PP2, c.DP2_DIST]),
    "moe": (c.MOE, ALL, [c.EP2, c.EP2_DIST, c.DP2_DIST, c.PP2, TP2_EP2, EP2_DP2_DIST]),
}
CASES = [
    case(
        flags,
        c.SOAP_HIDDEN if (model, optimizer) == ("moe", "soap") else OPTIMIZERS[optimizer],
        layout,
        f"{model}-{optimizer}-{layout.name}",
    )
    for model, (flags, optimizers, layouts) in MODELS.items()
    for optimizer in optimizers
    for layout in [c.ONE, *layouts]
]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run(CASES)


@pytest.mark.parametrize("name", [each.name for each in CASES if each.layout.name != "one"])
def test_layout_repeats_one_process(runs: dict[str, Run], name: str) -> None:
    model, optimizer, _ = name.split("-", 2)
    reference = runs[f"{model}-{optimizer}-one"]
    assert_same_curve(runs[name], reference)
    assert_same_state(runs[name], reference)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_learns(runs: dict[str, Run], optimizer: str) -> None:
    losses = runs[f"dense-{optimizer}-one"].losses
    assert losses[-1] < losses[0] - 0.25
