"""Sums over all that a rule trains span groups and shard groups: experts are a shard group of their own on some layouts only."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_opt.distributed.elementwise import ElementwiseStep
from megatron_opt.distributed.evaluation_weights import EvaluationWeights
from megatron_opt.distributed.param_shards import Rect
from megatron_opt.distributed.shard_group import ShardGroup
from megatron_opt.distributed.weight_average import WeightAverage
from megatron_opt.layout.region import Region
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

SHAPES = {"expert": (4, 6), "hidden": (5, 6), "norm": (6, 1)}
PLACES = {"one": [("expert", "hidden", "norm")], "experts apart": [("hidden", "norm"), ("expert",)]}


def _train(shard_groups: list[tuple[str, ...]], optimizer: Any, grouped: bool) -> dict[str, torch.Tensor]:
    """Weights after three steps, decayed and undecayed matrices in groups of their own."""
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    group_of = {name: int(grouped and name == "norm") for name in SHAPES}
    groups: Any = [SimpleNamespace(decay_mode="decoupled")] * 2
    param_groups = [{"lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.0}] * 2
    steps = []
    for names in shard_groups:
        param_shards: Any = [
            SimpleNamespace(
                view=SimpleNamespace(counts=True, param=weights[n]),
                main=weights[n].view(-1),
                model_copy=lambda: None,
                rects=[Rect(n, Region(0, SHAPES[n][0], 0, SHAPES[n][1]))],
            )
            for n in names
        ]
        holdings = [[(i, param_shard.rects[0]) for i, param_shard in enumerate(param_shards)]]
        infos = {n: MatrixInfo(n, SHAPES[n]) for n in names}
        cpu = torch.device("cpu")
        shard_group = ShardGroup("", None, 0, 1, param_shards, holdings, infos, None, own_device=cpu)  # type: ignore[arg-type]
        steps.append(ElementwiseStep(shard_group, groups, [optimizer, optimizer], group_of))
    for number in range(1, 4):
        grads = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        flats = [[grads[name].view(-1) for name in names] for names in shard_groups]
        sums: dict[str, torch.Tensor] = {}
        for step, mine in zip(steps, flats, strict=True):
            step.add_global_sum_terms(sums, mine, [1.0, 1.0], set(), number, param_groups)
        optimizer.advance(number, 0.1, sums.get(optimizer.name))
        for step, mine in zip(steps, flats, strict=True):
            step.step(mine, [1.0, 1.0], set(), number, param_groups, sums)
    return weights


def test_prodigys_distance_is_of_all_whatever_the_shard_groups_and_groups() -> None:
    def rule() -> Any:
        return registry.build("prodigy", {"d0": 1e-2})

    one = rule()
    reference = _train(PLACES["one"], one, grouped=False)
    assert float(one.numbers["numerator"]) != 0.0
    for shard_groups in PLACES.values():
        again = rule()
        found = _train(shard_groups, again, grouped=True)
        for key in ("d", "numerator"):
            assert float(again.numbers[key]) == pytest.approx(float(one.numbers[key]), rel=1e-6)
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_every_rank_sums_over_matrices_also_of_a_group_of_which_it_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two groups, as a grouping file makes them: ranks that sum once each would otherwise wait for one that does not."""
    calls: list[torch.Tensor] = []

    def sum_over_ranks(self: ShardGroup, values: torch.Tensor) -> torch.Tensor:
        calls.append(values)
        return values

    monkeypatch.setattr(ShardGroup, "sum_over_ranks", sum_over_ranks)
    counts = []
    for held in (("hidden", "norm"), ("norm",)):  # of two ranks, `hidden` in a group of its own
        weights = {name: torch.ones(SHAPES[name]) for name in held}
        param_shards: Any = [
            SimpleNamespace(
                view=SimpleNamespace(counts=True, param=weight),
                main=weight.view(-1),
                model_copy=lambda: None,
                rects=[Rect(name, Region(0, SHAPES[name][0], 0, SHAPES[name][1]))],
            )
            for name, weight in weights.items()
        ]
        infos = {name: MatrixInfo(name, SHAPES[name]) for name in ("hidden", "norm")}
        holdings = [[(i, param_shard.rects[0]) for i, param_shard in enumerate(param_shards)]]
        cpu = torch.device("cpu")
        shard_group = ShardGroup("", None, 0, 1, param_shards, holdings, infos, None, own_device=cpu)  # type: ignore[arg-type]
        groups: Any = [SimpleNamespace(decay_mode="decoupled")] * 2
        rules = [registry.build("cautious", {}), registry.build("mars", {"clip_scope": "matrix"})]
        step = ElementwiseStep(shard_group, groups, rules, {"hidden": 0, "norm": 1})
        calls.clear()
        grads = [torch.ones_like(param_shard.main) for param_shard in param_shards]
        step.step(grads, [1.0, 1.0], set(), 1, [{"lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.0}] * 2, {})
        counts.append(len(calls))
    assert counts[0] == counts[1] >= 1


def test_evaluation_weights_wait_for_a_background_save_and_leave_no_trace() -> None:
    weight, calls = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), list[Any]()
    before, optimizer = weight.clone(), registry.build("schedule_free", {})
    param_shard: Any = SimpleNamespace(
        view=SimpleNamespace(counts=True, param=weight), main=weight.view(-1), model_copy=lambda: None,
        rects=[Rect("w", Region(0, 3, 0, 4))], state={},
    )  # fmt: skip
    info, cpu = MatrixInfo("w", (3, 4)), torch.device("cpu")
    held = [[(0, param_shard.rects[0])]]
    shard_group = ShardGroup("", None, 0, 1, [param_shard], held, {"w": info}, None, own_device=cpu)  # type: ignore[arg-type]
    step = ElementwiseStep(shard_group, [SimpleNamespace(decay_mode="decoupled")], [optimizer], {"w": 0})  # type: ignore[list-item]
    lead = step.slices[0][0].state["lead"].copy_(torch.randn(12, generator=torch.Generator().manual_seed(2)))
    average = WeightAverage([shard_group], 0.5)
    average.begun = True
    average._averages[0].copy_(before.view(-1) - 1)
    evaluated = ((EvaluationWeights([step]), before - lead.view(3, 4)), (average, before - 1))
    for swap, wanted in evaluated:
        calls.clear()
        settle = lambda: calls.append(("settle", weight.clone()))  # noqa: E731
        with swap.in_place(lambda: calls.append(("publish", weight.clone())), settle):
            torch.testing.assert_close(weight, wanted)
        assert torch.equal(weight, before)
        assert [name for name, _ in calls] == ["settle", "publish", "publish"]
        assert torch.equal(calls[0][1], before) and torch.equal(calls[2][1], before)


@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_mars_clips_by_one_norm_whatever_the_shard_groups_and_groups(scope: str) -> None:
    optimizer = registry.build("mars", {"eps": 1e-1, "clip_scope": scope})
    reference = _train(PLACES["one"], optimizer, grouped=False)
    for shard_groups in PLACES.values():
        found = _train(shard_groups, optimizer, grouped=True)
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)
    unclipped = _train(PLACES["one"], registry.build("mars", {"eps": 1e-1, "max_grad_norm": 0.0}), grouped=False)
    assert not torch.allclose(unclipped["hidden"], reference["hidden"], rtol=1e-3)
