"""AdamW, Muon and SOAP repeat one process's run on every layout, whatever way matrices are computed."""

from collections.abc import Sequence

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_curve, assert_same_state
from tests.distributed.pool import Pool, Run

OPTIMIZERS = {
    "adamw": c.ADAMW,
    "muon": c.MUON,
    "soap": c.SOAP,
    "soap/default": ["--optimizer", "soap"],
    **{f"muon/{mode}": [*c.MUON, "--matrix-mode", mode] for mode in ("owner", "sharded", "group")},
    **{f"soap/{mode}": [*c.SOAP_ONE_SIDED, "--matrix-mode", mode] for mode in ("owner", "sharded", "group")},
    **{f"soap16/{mode}": [*c.SOAP_BLOCKS, "--matrix-mode", mode] for mode in ("sharded", "group")},
    **{f"normuon/{mode}": [*c.NORMUON, "--matrix-mode", mode] for mode in ("sharded", "group")},
    **{f"muon_h/{mode}": [*c.MUON_H, "--matrix-mode", mode] for mode in ("sharded", "group")},
    **{f"soap_h/{mode}": [*c.SOAP_H, "--matrix-mode", mode] for mode in ("sharded", "group")},
    **{f"adam_h/{mode}": [*c.ADAM_H, "--matrix-mode", mode] for mode in ("sharded", "group")},
    **{f"strips/{mode}": [*c.SOAP_STRIPS, "--matrix-mode", mode] for mode in ("sharded", "group")},
}
UNEVEN = "--decoder-first-pipeline-num-layers=1"
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
    c.DP4,
    c.DP4_DIST,
    c.PP2_DP2,
    c.PP2_DP2_DIST,
    Layout.of("pp2-uneven", 2, pp=2, more=(UNEVEN,)),
]
MODE_LAYOUTS = [c.TP2, c.DP2, c.TP2_DP2_DIST]
TP2_EP2 = Layout.of("tp2-ep2", 4, tp=2, ep=2, etp=1, sp=True)
ETP2 = Layout.of("tp2-etp2", 2, tp=2, etp=2, sp=True)
EP2_ETP2 = Layout.of("tp2-ep2-etp2", 4, tp=2, ep=2, etp=2, sp=True)
EP2_DP2_DIST = Layout.of("ep2-dp2-distopt", 4, ep=2, distopt=True)
MOE_LAYOUTS = [c.EP2, c.EP2_DIST, c.DP2_DIST, c.PP2, TP2_EP2, ETP2, EP2_ETP2, EP2_DP2_DIST]
BOTH, ALL = ("adamw", "muon"), ("adamw", "muon", "soap")
CUT = ("muon/sharded", "muon/group", "soap/sharded", "soap/group", "soap16/sharded", "soap16/group")
NORMS = ("normuon/sharded", "muon_h/sharded", "soap_h/sharded", "soap_h/group", "adam_h/sharded")  # summed over parts
MODELS = [
    ("dense", c.DENSE, ALL, DENSE_LAYOUTS),
    ("dense", c.DENSE, ALL, [c.DP2X2]),
    ("dense", c.DENSE, ("soap", "soap16/group", "muon_h/sharded"), [c.DP2X2_WITHIN]),
    ("moe", c.MOE, ("muon",), [c.EP2X2]),
    ("dense", c.DENSE, CUT, MODE_LAYOUTS),
    ("dense", c.DENSE, ("strips/sharded", "strips/group"), [c.TP2_DP2_DIST]),
    ("dense", c.DENSE, NORMS, [c.TP2_DP2_DIST]),
    ("dense", c.DENSE, ("soap/default",), [c.TP2, c.PP2, c.DP2_DIST, c.TP2_DP2_DIST, c.TP4]),
    ("gqa", c.GQA, ALL, [c.TP2, c.TP4]),
    ("gqa", c.GQA, ("muon/group",), [c.TP2]),
    ("tied", c.TIED, ALL, [c.TP2, c.PP2, c.VPP2, c.DP2_DIST, c.TP2_PP2]),
    ("gpt2", c.GPT2, BOTH, [c.TP2, c.TP2_PP2, c.DP2_DIST]),
    ("mtp", c.MTP, ("muon",), [c.TP2, c.DP2_DIST]),
    ("zloss", [*c.DENSE, "--z-loss-coeff", "0.01"], ("adamw",), [c.TP2]),
    ("gated", c.OUTPUT_GATE, ("muon",), [c.TP2, c.DP2_DIST]),
    ("moe", c.MOE, ALL, MOE_LAYOUTS),
    ("hybrid", c.HYBRID, ("muon",), [c.SP2, c.PP2, c.EP2]),
    ("moe", c.MOE, ("muon/group",), [EP2_ETP2, EP2_DP2_DIST]),
    ("moe", c.MOE, ("soap/default",), [c.EP2, c.DP2_DIST]),
]
NULL_SPACES = ("moe-soap.default",)  # routers' bases: rounding noise moves them, and no loss (docs/distributed.md)
SLOWER = [
    ("dense", c.DENSE, CUT, [c.DP2_DIST, c.TP2_DP2]),
    ("dense", c.DENSE, ("strips/sharded", "strips/group"), [c.TP2, c.DP2, c.TP2_DP2, c.DP2_DIST]),
    ("dense", c.DENSE, (*NORMS, "normuon/group", "muon_h/group"), [c.TP2, c.DP2, c.TP2_DP2_DIST, c.TP4, c.PP2_DP2_DIST]),
    ("moe", c.MOE, ("normuon/group", "muon_h/group"), [EP2_ETP2, EP2_DP2_DIST]),
    ("dense", c.DENSE, ("muon/owner", "soap/owner"), [*MODE_LAYOUTS, c.DP2_DIST, c.TP2_DP2]),
    ("dense", c.DENSE, ALL, [
        Layout.of("pp2-dp4-distopt", 8, pp=2, distopt=True),
        Layout.of("tp2-dp4-distopt", 8, tp=2, distopt=True),
        Layout.of("tp2-pp2-dp2", 8, tp=2, pp=2),
        Layout.of("tp2-pp2-vpp2-dp2-distopt", 8, tp=2, pp=2, vpp=2, sp=True, distopt=True),
        Layout.of("tp4-dp2", 8, tp=4),
        Layout.of("tp4-pp2", 8, tp=4, pp=2),
        Layout.of("tp2-pp2-uneven-dp2", 8, tp=2, pp=2, more=(UNEVEN,)),
    ]),
    ("dense", c.DENSE, ("muon/sharded", "muon/group", "soap/group", "strips/group"), [
        Layout.of("tp2-dp4-distopt", 8, tp=2, distopt=True),
    ]),
    ("dense", c.DENSE, (*ALL, "soap16/group", "muon_h/sharded"), [
        Layout.of("tp2-dp2x2", 8, tp=2, distopt=True, more=c.ACROSS),
        Layout.of("tp2-dp2x2-within", 8, tp=2, distopt=True, more=c.WITHIN),
    ]),
    ("dense", c.DENSE, ("muon",), [Layout.of("pp2-dp2x2", 8, pp=2, distopt=True, more=c.ACROSS)]),
    ("moe", c.MOE, ("muon", "soap"), [
        Layout.of("tp2-ep2-dp2x2", 8, tp=2, ep=2, etp=1, sp=True, distopt=True, more=c.ACROSS),
        Layout.of("tp2-ep2-dp2x2-within", 8, tp=2, ep=2, etp=1, sp=True, distopt=True, more=c.WITHIN),
    ]),
    ("tied", c.TIED, ("muon", "soap"), [Layout.of("tp2-pp2-vpp2-dp2-distopt", 8, tp=2, pp=2, vpp=2, distopt=True)]),
    ("gqa", c.GQA, ("muon", "soap"), [Layout.of("tp4-dp2-distopt", 8, tp=4, distopt=True)]),
    ("moe", c.MOE, ("muon", "soap"), [
        Layout.of("tp2-ep2-dp2-distopt", 8, tp=2, ep=2, etp=1, sp=True, distopt=True),
        Layout.of("tp2-ep2-etp2-pp2", 8, tp=2, ep=2, etp=2, pp=2, sp=True),
    ]),
]  # fmt: skip


def _cases(table: Sequence[tuple[str, Sequence[str], Sequence[str], Sequence[Layout]]]) -> list[Case]:
    """One process once for each model and optimizer, and every layout."""
    made: dict[str, Case] = {}
    for model, flags, optimizers, layouts in table:
        for optimizer in optimizers:
            options = c.SOAP_HIDDEN if (model, optimizer) == ("moe", "soap") else OPTIMIZERS[optimizer]
            for layout in [c.ONE, *layouts]:
                name = f"{model}-{optimizer.replace('/', '.')}-{layout.name}"
                made.setdefault(name, case(flags, options, layout, name))
    return list(made.values())


CASES, SLOW = _cases(MODELS), _cases(SLOWER)


def _wanted(cases: Sequence[Case], request: pytest.FixtureRequest) -> list[Case]:
    """The cases that the chosen tests compare, and their references."""
    ids = [item.callspec.id for item in request.session.items if getattr(item, "callspec", None)]
    wanted = {name for i in ids for name in (i, "-".join([*i.split("-")[:2], "one"]), f"dense-{i}-one")}
    return [each for each in cases if each.name in wanted]


@pytest.fixture(scope="module")
def runs(pool: Pool, request: pytest.FixtureRequest) -> dict[str, Run]:
    return pool.run(_wanted(CASES, request))


@pytest.fixture(scope="module")
def slow_runs(big_pool: Pool, request: pytest.FixtureRequest) -> dict[str, Run]:
    return big_pool.run(_wanted(SLOW, request))


@pytest.mark.parametrize("name", [each.name for each in CASES if each.layout.name != "one"])
def test_layout_repeats_one_process(runs: dict[str, Run], name: str) -> None:
    _compare(runs, name)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", [each.name for each in SLOW if each.layout.name != "one"])
def test_slower_layout_repeats_one_process(slow_runs: dict[str, Run], name: str) -> None:
    _compare(slow_runs, name)


def _compare(runs: dict[str, Run], name: str) -> None:
    model, optimizer, _ = name.split("-", 2)
    reference = runs[f"{model}-{optimizer}-one"]
    assert_same_curve(runs[name], reference)
    if not name.startswith(NULL_SPACES):
        assert_same_state(runs[name], reference)


@pytest.mark.parametrize("optimizer", ALL)
def test_training_learns(runs: dict[str, Run], optimizer: str) -> None:
    losses = runs[f"dense-{optimizer}-one"].losses
    assert losses[-1] < losses[0] - 0.15
