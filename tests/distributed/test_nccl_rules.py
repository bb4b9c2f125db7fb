"""NCCL's rules on gloo: a step of every kind of exchange keeps them, and the checks see who breaks them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed import cases as c
from tests.distributed import nccl_rules
from tests.distributed.cases import case
from tests.distributed.pool import Pool

MADE = [
    case(c.DENSE, [*c.MUON, "--matrix-mode", "sharded"], c.TP2_DP2_DIST, "nccl-muon", steps=2, hook="nccl"),
    case(
        c.DENSE,
        [*c.MUON, "--matrix-mode", "sharded", "--overlap-grad-reduce"],
        c.DP2X2,
        "nccl-instances",
        steps=2,
        hook="nccl",
    ),
    case(c.MOE, c.SOAP_STRIPS, c.EP2_DIST, "nccl-soap", steps=2, hook="nccl"),
]


def test_runs_keep_the_rules(pool: Pool) -> None:
    for name, run in pool.run(MADE).items():
        assert run.losses, name
        calls = [rank["calls"] for rank in run.ranks]
        nccl_rules.same_order(calls)
        assert any("all_to_all_single" in call for group in calls[0].values() for call in group), name


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> nccl_rules.Rules:
    """Rules with a process group of two that this process alone plays."""
    monkeypatch.setattr(nccl_rules.dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(nccl_rules.dist, "group", SimpleNamespace(WORLD="world"))
    return nccl_rules.Rules()


def _call(rules: nccl_rules.Rules, tensor: torch.Tensor, asynchronous: bool = False) -> Any:
    def all_reduce(tensor: Any, group: Any = None, async_op: bool = False) -> Any:
        return SimpleNamespace(wait=lambda: None) if async_op else None

    checked = nccl_rules._checked(rules, "all_reduce", all_reduce, ("tensor",))
    return checked(tensor, async_op=asynchronous)


def test_what_breaks_a_rule_is_seen(rules: nccl_rules.Rules) -> None:
    x = torch.zeros(4, 4)
    _call(rules, x)
    _call(rules, x[1], asynchronous=True).wait()
    assert rules.finish() == {"0,1": ["all_reduce torch.float32 16", "all_reduce torch.float32 4"]}
    _call(rules, x[:, 1])
    assert "strides" in rules.broken.pop()
    rules.is_on_gpu = lambda tensor: tensor.dtype != torch.float64
    _call(rules, x.double())
    assert "CPU" in rules.broken.pop()
    work = _call(rules, x, asynchronous=True)
    x[2].add_(1)
    _call(rules, x[2])
    assert "nobody has waited" in rules.broken.pop()
    work.wait()
    assert "was written" in rules.broken.pop()
    _call(rules, torch.zeros(2), asynchronous=True)
    with pytest.raises(AssertionError, match="nobody has waited"):
        rules.finish()


def test_another_order_is_seen() -> None:
    nccl_rules.same_order([{"0,1": ["a", "b"], "0": ["x"]}, {"0,1": ["a", "b"]}])
    with pytest.raises(AssertionError, match=r"collective 1: rank 0 calls \['b'\], rank 1 nothing"):
        nccl_rules.same_order([{"0,1": ["a", "b"]}, {"0,1": ["a"]}])
    with pytest.raises(AssertionError, match="collective 0"):
        nccl_rules.same_order([{"0,1": ["a", "b"]}, {"0,1": ["b", "a"]}])
