"""A group's factor on the learning rate reaches its parameters' steps, for element-wise and for matrix rules."""

import pytest
import torch

from tests.distributed import cases as c
from tests.distributed.cases import case
from tests.distributed.pool import Pool, Run

LR = 1e-3
FLAGS = [
    "--num-layers",
    "2",
    "--lr-decay-style",
    "constant",
    "--min-lr",
    "0",
    "--lr",
    str(LR),
    "--lr-warmup-iters",
    "0",
    "--weight-decay",
    "0",
]
GROUPS = """
groups:
- {match: "kind=hidden", optimizer: muon, lr_scale: %s, options: {fp32_matmul_prec: high}}
- {match: ".*", optimizer: signum}
"""


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    made = [
        case([*c.DENSE, *FLAGS], [*c.MUON, "--scalar-lr-ratio", str(ratio)], layout, f"{layout.name}-{ratio}", steps=1)
        for ratio in (0.25, 0.5)
        for layout in (c.ONE, c.DP2_DIST)
    ]
    for scale in (0.5, 1.0):
        path = pool.folder / f"groups-{scale}.yaml"
        path.write_text(GROUPS % scale)
        flags = ["--optimizer", "muon", "--optimizer-groups", str(path)]
        made.append(case([*c.DENSE, *FLAGS], flags, c.ONE, f"hidden-{scale}", steps=1))
    return pool.run(made)


@pytest.mark.parametrize("layout", ["one", "dp2-distopt"])
def test_first_adam_step_is_the_groups_learning_rate(runs: dict[str, Run], layout: str) -> None:
    """|u| is 1 at Adam's first step, so that two factors leave weights apart by their difference times lr."""
    small, large = (runs[f"{layout}-{ratio}"].weights for ratio in (0.25, 0.5))
    for name in ("output_layer.weight", "decoder.final_layernorm.weight"):
        apart = (small[name] - large[name]).abs()
        assert float(apart.median()) == pytest.approx(0.25 * LR, rel=1e-3), name
    hidden = "decoder.layers.0.mlp.linear_fc2.weight"
    assert torch.equal(small[hidden], large[hidden])


def test_matrix_rules_step_by_the_groups_learning_rate(runs: dict[str, Run]) -> None:
    half, full = (runs[f"hidden-{scale}"].weights for scale in (0.5, 1.0))
    hidden = "decoder.layers.0.mlp.linear_fc2.weight"
    step = float((full[hidden] - half[hidden]).norm())
    assert 0.5 * LR * 3 < step < 0.5 * LR * 12  # half of lr·√32 singular values near 1, √max(1, out/in) = 1
