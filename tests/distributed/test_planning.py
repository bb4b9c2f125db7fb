"""Plans: what a run does is what was planned for it; balance on clusters that nobody has here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opt.distributed.compute_shards import submatrices_of
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.ownership import Plan, pack
from megatron_opt.distributed.planning import Layout, ShardGroupPlan, from_args, plan_model
from megatron_opt.distributed.subgroups import pack_subgroups
from megatron_opt.engine_options import MODES, EngineOptions
from megatron_opt.layout.spec import ModelSpec
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.optimizers.groups import default_group_configs
from megatron_opt.training.optimizer_flags import read_group_configs
from tests.distributed import cases as c
from tests.distributed.cases import case
from tests.distributed.pool import Pool, Run
from tests.training.refusing import parsed

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
        ("moe", c.MOE, c.DP2_DIST, []),
        ("mtp", c.MTP, c.TP2, []),
        ("shared", c.SHARED_EXPERTS, c.EP2, []),
        ("hybrid", c.HYBRID, c.PP2, []),
        ("bf16", c.DENSE, c.TP2_DP2_DIST, ["--bf16", "--exchange-dtype", "bf16"]),
        ("overlap", c.DENSE, c.DP2X2, c.OVERLAP),
        ("sharded", c.DENSE, c.DP2X2, ["--matrix-mode", "sharded"]),
        ("sharded", c.DENSE, c.DP2X2_WITHIN, ["--matrix-mode", "sharded"]),
        ("moe", c.MOE, c.EP2X2, ["--matrix-instances=auto"]),
    )
] + [
    case(c.DENSE, [*optimizer, "--matrix-mode", mode], c.TP2_DP2_DIST, f"{name}-{mode}", steps=STEPS, hook="plan")
    for name, optimizer in (("blocks", c.SOAP_BLOCKS), ("strips", c.SOAP_STRIPS))
    for mode in ("sharded", "group")
]


@pytest.fixture(scope="module")
def runs(pool: Pool) -> dict[str, Run]:
    return pool.run(MADE)


@pytest.mark.parametrize("made", MADE, ids=lambda made: made.name)
def test_a_run_is_what_was_planned_part_for_part_and_byte_for_byte(runs: dict[str, Run], made: c.Case) -> None:
    """The plan is made here, from Megatron's own model on `meta`, for ranks that are elsewhere."""
    run = runs[made.name]
    assert run.losses
    args = parsed(made.argv("data"), made.ranks)
    planned = {each.name: each for each in from_args(args, made.ranks, read_group_configs(args))}
    assert {shard_group["name"] for rank in run.ranks for shard_group in rank["domains"]} == set(planned)
    for rank in run.ranks:
        for shard_group in rank["domains"]:
            mine = planned[shard_group["name"]]
            assert shard_group["parts"] == [(p.matrix, p.rank, *p.bounds) for p in mine.plan.parts]
            assert shard_group["digest"] == mine.plan.digest() == shard_group["file"]["digest"]
            assert len(shard_group["file"]["load"]) == len(shard_group["file"]["flops"])
            counts = {what: values[shard_group["rank"] % len(values)] for what, values in mine.sent.items()}
            assert counts == shard_group["known"]
            for what, count in counts.items():
                assert shard_group["sent"].get(what, 0) == STEPS * count, (what, rank)


def _llama(layers: int, hidden: int, ffn: int, heads: int, groups: int = 0) -> ModelSpec:
    return ModelSpec.of(
        {
            "num-layers": layers, "hidden-size": hidden, "ffn-hidden-size": ffn, "num-attention-heads": heads,
            "group-query-attention": bool(groups), "num-query-groups": groups, "normalization": "RMSNorm",
            "disable-bias-linear": True, "swiglu": True, "padded-vocab-size": 32000, "position-embedding-type": "rope",
            "untie-embeddings-and-output-weights": True,
        }
    )  # fmt: skip


LLAMA_7B, LLAMA_130M = _llama(32, 4096, 11008, 32), _llama(32, 512, 2048, 8)


def _planned(model: ModelSpec, layout: Layout, optimizer: str = "muon", **more: Any) -> list[ShardGroupPlan]:
    stages = dict(enumerate(model.stages(layout.pp, layout.virtual)))
    return plan_model(stages, model.geometry, layout, default_group_configs(optimizer), **more)


def _plans(model: ModelSpec, layout: Layout, optimizer: str = "muon") -> list[Plan]:
    return [found.plan for found in _planned(model, layout, optimizer)]


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
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
    ids=[
        "130m-dp8",
        "130m-tp2dp4",
        "130m-tp4dp2",
        "7b-dp64",
        "7b-tp8dp8",
        "7b-tp8pp4dp2",
        "7b-tp8dp64",
        "7b-tp8pp4dp16",
    ],
)
def test_the_most_loaded_rank_is_near_the_mean(config: ModelSpec, layout: Layout, optimizer: str) -> None:
    for plan in _plans(config, layout, optimizer):
        assert plan.imbalance() < 1.05
        assert max(plan.flops) * len(plan.flops) < 1.05 * sum(plan.flops)
        assert plan.state_imbalance() < 1.1


def test_matrices_are_cut_only_where_balance_asks_for_it() -> None:
    (few,) = _plans(LLAMA_7B, Layout(tp=8, dp=8, distributed=True))
    assert len(few.parts) == len(few.owner)
    (many,) = _plans(LLAMA_7B, Layout(tp=8, dp=64, distributed=True))
    assert len(many.owner) < len(many.parts) < len(many.owner) + 512


LLAMA_70B = _llama(80, 8192, 28672, 64, 8)
LLAMA_70B_HEADS = _llama(
    80, 8192, 28672, 64
)  # squares with more load, long matrices with more state: subgroups alone do not do


@pytest.mark.parametrize(
    ("config", "layout", "most"),
    [
        (LLAMA_7B, Layout(tp=8, dp=64, distributed=True), 0.9),
        (LLAMA_7B, Layout(tp=8, pp=4, dp=128, distributed=True), 0.75),
        (LLAMA_70B, Layout(tp=8, pp=4, dp=32, distributed=True), 0.75),
        (LLAMA_70B_HEADS, Layout(tp=8, pp=4, dp=32, distributed=True), 1.01),
    ],
    ids=["7b-512", "7b-4096", "70b-1024", "70b-heads-1024"],
)
def test_of_what_balances_the_plan_sends_least(config: ModelSpec, layout: Layout, most: float) -> None:
    """Within the goals for load and state, and beside what one line of all ranks sends between shards; more room, less.

    Where subgroups do not suffice, ranks that share two kinds send as much as in the line.
    """
    (auto, line, wide, whole) = (
        _planned(config, layout, which=[0], options=EngineOptions(matrix_mode=mode, matrix_balance=room))[0].plan
        for mode, room in (("auto", 1.1), ("group", 1.1), ("auto", 2.0), ("owner", 1.1))
    )
    assert auto.imbalance() < 1.15 and auto.is_balanced()
    assert max(auto.exchanged) <= most * max(line.exchanged)
    assert sum(auto.exchanged) < 0.95 * sum(line.exchanged)
    assert sum(wide.exchanged) < 0.8 * sum(auto.exchanged) and wide.price() <= auto.price()
    assert max(max(wide.load) / max(whole.load), max(wide.state_bytes) / max(whole.state_bytes)) < 0.7
    assert wide.is_balanced(2.0) and not any(whole.exchanged)


def test_bytes_between_slices_are_those_of_the_routes() -> None:
    for optimizer in ("muon", "soap"):
        (found,) = _planned(LLAMA_7B, Layout(dp=512), optimizer)
        assert found.sent["between shards"] == found.plan.exchanged


def test_soap_is_cut_between_blocks() -> None:
    """A side with a factor between its blocks; slices are of one block, along the side without a factor."""
    (plan,) = _plans(LLAMA_7B, Layout(tp=8, dp=64, distributed=True), "soap")
    square = [part for part in plan.parts if part.shape == (4096, 4096) and part.submatrix]
    assert len({part.buffer_shape for part in square}) > 3
    assert all(side % 512 == 0 for part in square for side in part.bounds)
    sliced = [submatrix for submatrix in submatrices_of(plan.parts) if len(submatrix.parts) > 1]
    assert sliced and all(
        min(submatrix.area[1] - submatrix.area[0], submatrix.area[3] - submatrix.area[2]) == 512 for submatrix in sliced
    )


def test_work_does_not_grow_with_ranks() -> None:
    one = sum(sum(plan.flops) for plan in _plans(LLAMA_130M, Layout()))
    many = sum(sum(plan.flops) for plan in _plans(LLAMA_130M, Layout(tp=2, pp=2, dp=4, distributed=True)))
    assert many == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_planning_for_4096_ranks_is_quick(optimizer: str) -> None:
    import megatron.core.optimizer.distrib_optimizer  # noqa: F401  # its import is not planning

    started = time.process_time()
    plans = _plans(LLAMA_7B, Layout(tp=8, pp=4, dp=128, distributed=True), optimizer)
    assert time.process_time() - started < 10
    assert all(plan.imbalance() < 1.15 for plan in plans)


sizes = st.integers(1, 300)


@given(st.lists(st.tuples(sizes, sizes, st.booleans()), min_size=1, max_size=12), st.integers(1, 40))
def test_every_row_and_column_is_placed_once(shapes: list[tuple[int, int, bool]], ranks: int) -> None:
    optimizer = registry.build("muon", {})
    whole = registry.build("muon", {"momentum_dtype": "int8"})
    jobs = [
        Job.of(MatrixInfo(f"m{i}", (rows, columns)), optimizer if cut else whole)
        for i, (rows, columns, cut) in enumerate(shapes)
    ]
    for mode, most in [*((mode, 1.1) for mode in MODES), ("auto", 1.6)]:
        plan = pack(jobs, ranks, mode, most)
        for job in jobs:
            parts = [part for part in plan.parts if part.matrix == job.matrix]
            assert [part.index for part in parts] == list(range(len(parts)))
            assert len({part.rank for part in parts}) == len(parts)
            edges = [0, *[part.stop for part in parts]]
            assert [part.start for part in parts] == edges[:-1] and sorted(set(edges)) == edges
            assert edges[-1] == job.shape[parts[0].dim]
            assert len(parts) == 1 or (mode != "owner" and job.shard_dim is not None)
            assert plan.owner[job.matrix] == parts[0].rank
        assert sum(plan.flops) == pytest.approx(sum(job.cost.mean_flops() for job in jobs))
        assert sum(plan.load) >= sum(job.load for job in jobs) * (1 - 1e-9)


@given(
    st.lists(st.tuples(sizes, sizes, st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=5),
    st.integers(1, 60),
    st.sampled_from([1.0, 1.1, 1.5, 3.0]),
)
def test_subgroups_place_everything_once(kinds: list[tuple[int, int, int, int]], ranks: int, most: float) -> None:
    """Slices, submatrices and matrices that cannot be cut; several of each kind."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("muon", {}),
        ("muon", {"momentum_dtype": "int8"}),
        ("soap", {"block_size": 16}),
    ]
    optimizers = [registry.build(name, more) for name, more in options]
    jobs = [
        Job.of(MatrixInfo(f"m{kind}.{i}", (rows, columns)), optimizers[which])
        for kind, (rows, columns, which, count) in enumerate(kinds)
        for i in range(count)
    ]
    placed = pack_subgroups(jobs, ranks, most)
    assert sorted(placed) == sorted(job.matrix for job in jobs)
    for job in jobs:
        runs = placed[job.matrix]
        assert [start for _, start, _ in runs] == [0, *[stop for _, _, stop in runs[:-1]]] and runs[-1][2] == job.units
        assert all(start < stop for _, start, stop in runs)
        assert len({rank for rank, _, _ in runs}) == len(runs) and all(0 <= rank < ranks for rank, _, _ in runs)


@given(st.integers(1, 30), st.integers(1, 60))
def test_subgroups_of_one_kind_are_even(count: int, ranks: int) -> None:
    """Where each rank can have a tenth more than its share, none has more; cuts are fewer than in one line."""
    optimizer = registry.build("muon", {})
    jobs = [Job.of(MatrixInfo(f"m{i}", (2048, 2048)), optimizer) for i in range(count)]
    placed = pack_subgroups(jobs, ranks, 1.1)
    shares = [0.0] * ranks
    for runs in placed.values():
        for rank, start, stop in runs:
            shares[rank] += (stop - start) / 2048
    assert max(shares) <= 1.1 * count / ranks + 8 / 2048  # slices are of four columns
    assert sum(len(runs) - 1 for runs in placed.values()) <= max(0, ranks - 1)


@given(
    st.lists(st.tuples(sizes, sizes, st.integers(0, 2)), min_size=1, max_size=8),
    st.integers(1, 40),
    st.sampled_from(MODES),
)
def test_cells_cover_every_matrix_once(shapes: list[tuple[int, int, int]], ranks: int, mode: str) -> None:
    """Between blocks only, one part of a submatrix on a rank, the work that of the whole."""
    optimizers = [
        registry.build("soap", {"block_size": 16, **more})
        for more in ({}, {"one_sided": True}, {"max_precond_dim": 90})
    ]
    infos = {f"m{i}": MatrixInfo(f"m{i}", (rows, columns)) for i, (rows, columns, _) in enumerate(shapes)}
    infos["v"] = MatrixInfo("v", (60,))
    chosen = {f"m{i}": optimizers[which] for i, (_, _, which) in enumerate(shapes)} | {"v": optimizers[0]}
    jobs = [Job.of(info, chosen[name]) for name, info in infos.items()]
    plan = pack(jobs, ranks, mode)
    for job in jobs:
        parts = [part for part in plan.parts if part.matrix == job.matrix]
        assert [part.index for part in parts] == list(range(len(parts)))
        covered = torch.zeros(job.shape, dtype=torch.int32)
        for part in parts:
            r0, r1, c0, c1 = part.bounds
            covered[r0:r1, c0:c1] += 1
        assert covered.eq(1).all()
        for submatrix in submatrices_of(parts):
            r0, r1, c0, c1 = submatrix.area
            assert len({part.rank for part in submatrix.parts}) == len(submatrix.parts)
            assert r0 % job.tile[0] == c0 % job.tile[1] == 0
            assert r1 == job.shape[0] or r1 % job.tile[0] == 0
            assert c1 == job.shape[1] or c1 % job.tile[1] == 0
            assert submatrix.is_whole or mode != "owner"
    assert sum(plan.flops) == pytest.approx(sum(job.cost.mean_flops() for job in jobs))


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
