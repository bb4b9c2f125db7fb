"""Plans: what a run does is what was planned for it; balance on clusters that nobody has here."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_opt.distributed.ownership import Plan
from megatron_opt.distributed.planning import Layout, gpt_parameters, plan_model
from megatron_opt.optimizers.groups import default_rules
from tests.distributed import cases as c
from tests.distributed.cases import case
from tests.distributed.pool import Pool, Run

STEPS = 3
MADE = [
    case(model, [*c.MUON, *more], layout, f"{name}-{layout.name}", steps=STEPS, hook="plan")
    for name, model, layout, more in (
        ("dense", c.DENSE, c.TP2, []),
        ("dense", c.DENSE, c.DP2, []),
        ("dense", c.DENSE, c.TP2_DP2_DIST, []),
        ("overlap", c.DENSE, c.DP2_DIST, ["--overlap-grad-reduce"]),
        ("sharded", c.DENSE, c.TP2_DP2_DIST, ["--matrix-mode", "sharded"]),
        ("tied", c.TIED, c.PP2, []),
        ("vpp", c.DENSE, c.VPP2, []),
        ("gpt2", c.GPT2, c.DP2_DIST, []),
        ("moe", c.MOE, c.EP2_DIST, []),
        ("bf16", c.DENSE, c.TP2_DP2_DIST, ["--bf16", "--exchange-dtype", "bf16"]),
    )
]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run(MADE)


@pytest.mark.parametrize("name", [each.name for each in MADE])
def test_bytes_sent_equal_the_plan(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    assert run.losses
    for rank in run.ranks:
        for domain in rank["domains"]:
            planned, known = domain["digests"]
            assert planned == known
            assert domain["planned"] == domain["known"]
            for what, count in domain["planned"].items():
                assert domain["sent"].get(what, 0) == STEPS * count, (what, rank)


def _llama(layers: int, hidden: int, ffn: int, heads: int) -> Any:
    return SimpleNamespace(
        num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, moe_ffn_hidden_size=None, num_attention_heads=heads,
        num_query_groups=heads, kv_channels=hidden // heads, normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, num_moe_experts=None, multi_latent_attention=False,
    )


LLAMA_7B, LLAMA_130M = _llama(32, 4096, 11008, 32), _llama(32, 512, 2048, 8)


def _plans(config: Any, layout: Layout) -> list[Plan]:
    parameters = gpt_parameters(config, 32000, tied=False)
    return [found.plan for found in plan_model(parameters, config, layout, default_rules("muon"))]


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (LLAMA_130M, Layout(dp=8, distributed=True)),
        (LLAMA_130M, Layout(tp=2, dp=4, distributed=True)),
        (LLAMA_130M, Layout(tp=4, dp=2)),
        (LLAMA_7B, Layout(dp=64, distributed=True)),
        (LLAMA_7B, Layout(tp=8, dp=8, distributed=True)),
        (LLAMA_7B, Layout(tp=8, pp=4, dp=2, distributed=True)),
    ],
    ids=["130m-dp8", "130m-tp2dp4", "130m-tp4dp2", "7b-dp64", "7b-tp8dp8", "7b-tp8pp4dp2"],
)
def test_the_most_loaded_rank_is_near_the_mean(config: Any, layout: Layout) -> None:
    for plan in _plans(config, layout):
        assert plan.imbalance() < 1.15
        mean = sum(plan.state_bytes) / len(plan.state_bytes)
        assert max(plan.state_bytes) < 1.15 * mean


def test_work_does_not_grow_with_ranks() -> None:
    one = sum(sum(plan.flops) for plan in _plans(LLAMA_130M, Layout()))
    many = sum(sum(plan.flops) for plan in _plans(LLAMA_130M, Layout(tp=2, pp=2, dp=4, distributed=True)))
    assert many == pytest.approx(one, rel=0.01)


def test_planning_for_4096_ranks_is_quick() -> None:
    import megatron.core.optimizer.distrib_optimizer  # noqa: F401  # its import is not planning

    started = time.process_time()
    _plans(LLAMA_7B, Layout(tp=8, pp=4, dp=128, distributed=True))
    assert time.process_time() - started < 10
