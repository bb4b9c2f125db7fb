"""The cost model's plan is the engine's: equal packing for every stage, and its traffic that of the exact routes."""

import pytest

from megatron_opt.cost_model.cluster import load
from megatron_opt.cost_model.flags import grouping, parse
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.optimizer_time import shard_group_time
from megatron_opt.cost_model.plan import plans
from megatron_opt.distributed import planning
from megatron_opt.engine_options import EngineOptions


def engine_plans(model: Model, layout: Layout, group_configs: list) -> list[planning.ShardGroupPlan]:
    sizes = planning.Layout(
        layout.tp, layout.pp, layout.data_parallel, distributed=layout.distributed, instances=layout.instances
    )
    return planning.plan_model(
        dict(enumerate(model.stages(layout.pp))), model.geometry, sizes, group_configs, layout.engine
    )


@pytest.mark.parametrize("name", ["muon", "soap"])
@pytest.mark.parametrize(
    ("tp", "pp", "dp", "distributed"),
    [(1, 1, 4, False), (2, 1, 1, False), (2, 2, 2, False), (1, 1, 8, True), (2, 2, 4, True), (4, 1, 16, True)],
)
def test_packing_and_traffic_are_the_engines(name: str, tp: int, pp: int, dp: int, distributed: bool) -> None:
    assert_the_engines(name, Layout(tp * pp * dp, tp=tp, pp=pp, global_batch=64, distributed=distributed))


@pytest.mark.parametrize("owners", ["across", "within"])
def test_of_instances_too(owners: str) -> None:
    engine = EngineOptions(matrix_instances=owners)
    assert_the_engines("muon", Layout(16, tp=2, global_batch=64, distributed=True, instances=2, engine=engine))


def assert_the_engines(name: str, layout: Layout) -> None:
    flags, _ = parse(f"--preset llama-130m --num-layers 8 --optimizer {name}".split())
    model, group_configs = Model.of(flags), grouping(flags)
    mine = [shard_group for stage in plans(model, layout, group_configs, exact=True) for shard_group in stage]
    theirs = engine_plans(model, layout, group_configs)
    assert len(mine) == len(theirs) == layout.pp
    estimated = [shard_group for stage in plans(model, layout, group_configs) for shard_group in stage]
    for ours, guess, exact in zip(mine, estimated, theirs, strict=True):
        assert sorted(ours.plan.load) == pytest.approx(sorted(exact.plan.load))
        assert sorted(ours.plan.state_bytes) == pytest.approx(sorted(exact.plan.state_bytes))
        sent = shard_group_time(ours, layout, load("h100")).sent
        assert sum(sent.values()) == pytest.approx(max(exact.sent_by_rank().values()))
        # the estimate without routes: near where matrices stay whole, up to twice where slices fall to ranks that hold them
        bound, most = shard_group_time(guess, layout, load("h100")).sent, 2.0 if name == "soap" else 1.1
        for kind, tolerance in (("gradients to owners", 0.9), ("updates to shards", 0.85)):
            each = exact.sent[kind]
            assert tolerance * sum(each) / len(each) <= bound.get(kind, 0.0) <= most * max(each) * 1.05
