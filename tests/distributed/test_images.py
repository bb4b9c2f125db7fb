"""bf16 parameters are their fp32 main copies, rounded, whether the kernel or a pass of its own writes them."""

import pytest

from tests.distributed import cases as c
from tests.distributed.cases import case
from tests.distributed.pool import Pool, Run

DENSE = [*c.DENSE, "--num-layers", "2", "--bf16"]
LAYOUTS = [c.ONE, c.TP2, c.DP2_DIST]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run([
        case(DENSE, ["--optimizer", name], layout, f"{name}-{layout.name}", steps=3, hook="images")
        for name in ("adamw", "muon", "muon_h") for layout in LAYOUTS
    ])  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", ["adamw", "muon", "muon_h"])
def test_parameters_are_the_main_copies_rounded(runs: dict[str, Run], name: str, layout: c.Layout) -> None:
    run = runs[f"{name}-{layout.name}"]
    assert len(run.losses) == 3 and run.losses[2] < run.losses[0]
    for rank in run.ranks:
        by_kernel = [written for written, _ in rank["images"]]
        assert all(equal for _, equal in rank["images"])
        assert 0 < sum(by_kernel) < len(by_kernel) if name == "muon_h" else all(by_kernel)
