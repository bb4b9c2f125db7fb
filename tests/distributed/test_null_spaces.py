"""Rules of factors repeat one process where gradients have null spaces: made-up data, refreshes inside."""

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import Case, Layout, case
from tests.distributed.compare import assert_same_curve
from tests.distributed.pool import Pool, Run

STEPS = 12
RULES = ("soap", "shampoo", "kron", "soap_h")
DEEP = (
    "--num-layers 8 --hidden-size 96 --num-attention-heads 12 --group-query-attention --num-query-groups 4 "
    "--untie-embeddings-and-output-weights --global-batch-size 12"
).split()
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
QUICK = [c.TP4]  # two groups on four ranks
DEEP_LAYOUTS = [
    c.TP2,
    c.TP4,
    Layout.of("tp2-dp3", 6, tp=2, distopt=True),
    Layout.of("tp2-sp-overlap", 2, tp=2, sp=True, distopt=True, more=OVERLAP),
]


def _case(model: str, optimizer: str, layout: Layout) -> Case:
    flags = {"gqa": c.GQA, "deep": DEEP}[model]
    refresh = [] if optimizer == "kron" else [f"--{optimizer.replace('_', '-')}-precondition-frequency", "5"]
    name = f"{model}-{optimizer}-{layout.name}"
    return case(flags, ["--optimizer", optimizer, *refresh], layout, name, steps=STEPS, hook="mock_data")


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run([_case("gqa", optimizer, layout) for optimizer in RULES for layout in [c.ONE, *QUICK]])


@pytest.fixture(scope="module")
def deep_runs(big_pool: Pool) -> dict[str, Run]:
    return big_pool.run([_case("deep", optimizer, each) for optimizer in RULES for each in [c.ONE, *DEEP_LAYOUTS]])


@pytest.mark.parametrize("layout", QUICK, ids=lambda layout: layout.name)
@pytest.mark.parametrize("optimizer", RULES)
def test_rules_repeat_one_process_where_gradients_have_null_spaces(
    runs: dict[str, Run], optimizer: str, layout: Layout
) -> None:
    assert_same_curve(runs[f"gqa-{optimizer}-{layout.name}"], runs[f"gqa-{optimizer}-one"], steps=STEPS)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", DEEP_LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("optimizer", RULES)
def test_deep_models_repeat_one_process(deep_runs: dict[str, Run], optimizer: str, layout: Layout) -> None:
    """Small directions carry the rounding of the largest: docs/distributed.md, "Exactness"."""
    assert_same_curve(
        deep_runs[f"deep-{optimizer}-{layout.name}"], deep_runs[f"deep-{optimizer}-one"], 1e-4, steps=STEPS
    )
