"""An all-reduce over one rank leaves a tensor as gloo would, at once; asynchronous ones are still gloo's."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_opt.platform.single_rank import ALL_REDUCE


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    ALL_REDUCE.install()
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("op", [dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT])
def test_as_gloo_without_it(op, monkeypatch):
    given = torch.randn(7, generator=torch.Generator().manual_seed(1))
    ours, gloos = given.clone(), given.clone()
    ALL_REDUCE.original()(gloos, op)
    monkeypatch.setitem(ALL_REDUCE.original().__globals__, "_get_default_group", lambda: pytest.fail("asked gloo"))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    assert dist.all_reduce(ours, op) is None
    assert torch.equal(ours, gloos) and torch.equal(ours, given)


def test_asynchronous_ones_and_other_worlds_are_of_gloo(monkeypatch):
    work = dist.all_reduce(torch.ones(2), async_op=True)
    assert work.wait()
    asked = []
    monkeypatch.setattr(type(ALL_REDUCE), "original", lambda self: lambda *args: asked.append(args))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    dist.all_reduce(torch.ones(2), group="both")
    assert [args[2] for args in asked] == ["both"]
