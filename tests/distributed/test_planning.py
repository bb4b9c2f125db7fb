"""Plans: what a run does is what was planned for it; balance on clusters that nobody has here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.distributed.ownership import MODES, Job, Plan, pack
from megatron_opt.distributed.planning import Layout, gpt_parameters, plan_model
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
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
        ("group", c.DENSE, c.TP2_DP2_DIST, ["--matrix-mode", "group"]),
        ("group", c.DENSE, c.DP2, ["--matrix-mode", "group"]),
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


def _plans(config: Any, layout: Layout, rule: str = "muon") -> list[Plan]:
    parameters = gpt_parameters(config, 32000, tied=False)
    return [found.plan for found in plan_model(parameters, config, layout, default_rules(rule))]


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (LLAMA_130M, Layout(dp=8, distributed=True)),
        (LLAMA_130M, Layout(tp=2, dp=4, distributed=True)),
        (LLAMA_130M, Layout(tp=4, dp=2)),
        (LLAMA_7B, Layout(dp=64, distributed=True)),
        (LLAMA_7B, Layout(tp=8, dp=8, distributed=True)),
        (LLAMA_7B, Layout(tp=8, pp=4, dp=2, distributed=True)),
        (LLAMA_7B, Layout(tp=8, dp=64, distributed=True)),
        (LLAMA_7B, Layout(tp=8, pp=4, dp=16, distributed=True)),
    ],
    ids=["130m-dp8", "130m-tp2dp4", "130m-tp4dp2", "7b-dp64", "7b-tp8dp8", "7b-tp8pp4dp2", "7b-tp8dp64", "7b-tp8pp4dp16"],
)
def test_the_most_loaded_rank_is_near_the_mean(config: Any, layout: Layout) -> None:
    for plan in _plans(config, layout):
        assert plan.imbalance() < 1.05
        mean = sum(plan.state_bytes) / len(plan.state_bytes)
        assert max(plan.state_bytes) < 1.1 * mean


def test_matrices_are_cut_only_where_balance_asks_for_it() -> None:
    (few,) = _plans(LLAMA_7B, Layout(tp=8, dp=8, distributed=True))
    assert len(few.parts) == len(few.owner)
    (many,) = _plans(LLAMA_7B, Layout(tp=8, dp=64, distributed=True))
    assert len(many.owner) < len(many.parts) < len(many.owner) + 512


def test_soap_is_cut_between_blocks() -> None:
    """A column of blocks is a sixth of a rank's mean on 512 ranks: that is how near the mean the plan comes."""
    (plan,) = _plans(LLAMA_7B, Layout(tp=8, dp=64, distributed=True), "soap")
    assert plan.imbalance() < 1.2
    inner = [part.start for part in plan.parts if part.start and part.shape == (4096, 4096)]
    assert inner and all(start % 512 == 0 for start in inner)


def test_work_does_not_grow_with_ranks() -> None:
    one = sum(sum(plan.flops) for plan in _plans(LLAMA_130M, Layout()))
    many = sum(sum(plan.flops) for plan in _plans(LLAMA_130M, Layout(tp=2, pp=2, dp=4, distributed=True)))
    assert many == pytest.approx(one, rel=1e-9)


def test_planning_for_4096_ranks_is_quick() -> None:
    import megatron.core.optimizer.distrib_optimizer  # noqa: F401  # its import is not planning

    started = time.process_time()
    plans = _plans(LLAMA_7B, Layout(tp=8, pp=4, dp=128, distributed=True))
    assert time.process_time() - started < 10
    assert all(plan.imbalance() < 1.15 for plan in plans)


sizes = st.integers(1, 300)


@given(st.lists(st.tuples(sizes, sizes, st.booleans()), min_size=1, max_size=12), st.integers(1, 40))
def test_every_row_and_column_is_placed_once(shapes: list[tuple[int, int, bool]], ranks: int) -> None:
    rule = registry.build("muon", {})
    whole = registry.build("muon", {"momentum_dtype": "int8"})
    jobs = [
        Job.of(MatrixInfo(f"m{i}", (rows, columns)), rule if cut else whole) for i, (rows, columns, cut) in enumerate(shapes)
    ]
    for mode in MODES:
        plan = pack(jobs, ranks, mode)
        for job in jobs:
            parts = [part for part in plan.parts if part.matrix == job.matrix]
            assert [part.index for part in parts] == list(range(len(parts)))
            assert len({part.rank for part in parts}) == len(parts)
            edges = [0, *[part.stop for part in parts]]
            assert [part.start for part in parts] == edges[:-1] and sorted(set(edges)) == edges
            assert edges[-1] == job.shape[parts[0].dim]
            assert len(parts) == 1 or (mode != "owner" and job.split_dim is not None)
            assert plan.owner[job.matrix] == parts[0].rank
        assert sum(plan.flops) == pytest.approx(sum(job.cost.mean_flops() for job in jobs))
        assert sum(plan.load) >= sum(job.load for job in jobs) * (1 - 1e-9)


PLANNED = (
    "--preset llama-7b --optimizer muon --tensor-model-parallel-size 8 --use-distributed-optimizer --mock-data "
    "--plan-world-size 64 --global-batch-size 512 --train-iters 10000 --tokenizer-type NullTokenizer --vocab-size 31999"
)


def test_a_cluster_that_is_not_there_is_planned_from_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_opt.pretrain", *PLANNED.split(), "--output-dir", str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("optimizer_plan.*.json")
    found = json.loads(file.read_text())
    assert len(found["load"]) == 64 and f"{found['imbalance']:.3f}" in done.stdout
    expected = _plans(LLAMA_7B, Layout(tp=8, dp=8, distributed=True))[0]
    assert found["digest"] == expected.digest()
