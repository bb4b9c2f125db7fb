"""The matrix step on ranks that are threads: whole, grouped and sliced matrices against the rule on whole matrices."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opt.distributed import exchange as exchange_module
from megatron_opt.distributed.domain import Domain, MatrixPlan
from megatron_opt.distributed.exchange import Exchange
from megatron_opt.distributed.fragments import Rect
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.ownership import Job
from megatron_opt.distributed.planning import sent_in_a_step
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", {"fp32_matmul_prec": "high"}),
    "scion-bf16": ("scion", {"fp32_matmul_prec": "medium"}),
    "soap": ("soap", {"one_sided": True, "precondition_frequency": 2, "factor_precision": "fp64", "eps": 1e-6}),
    "adam_mini": ("adam_mini", {}),
}
SHAPES = {"a": (12, 30), "b": (24, 24), "c": (40, 6), "d": (8, 70), "e": (16, 20)}


class Mailbox:
    """All-to-all among threads; each knows its rank."""

    def __init__(self, size: int) -> None:
        self.posted: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)
        self.local = threading.local()

    def all_to_all_single(
        self, received: Tensor, message: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], **rest: Any
    ) -> Any:
        me = self.local.rank
        self.posted[me] = message.split(list(in_splits))
        self.barrier.wait()
        received.copy_(torch.cat([pieces[me] for pieces in self.posted]))
        assert [len(pieces[me]) for pieces in self.posted] == list(out_splits)
        self.barrier.wait()
        return SimpleNamespace(wait=lambda: None)


def _rows(length: int, rank: int, size: int) -> tuple[int, int]:
    return length * rank // size, length * (rank + 1) // size


@pytest.mark.parametrize("mode", ["owner", "group", "sharded"])
@pytest.mark.parametrize("bucket_bytes", [1e9, 3000.0], ids=["one-bucket", "buckets"])
@pytest.mark.parametrize("name", RULES)
def test_every_mode_repeats_the_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str, bucket_bytes: float
) -> None:
    size = 7  # more than the shortest side
    mailbox = Mailbox(size)
    monkeypatch.setattr(exchange_module.dist, "all_to_all_single", mailbox.all_to_all_single)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(Domain, "sum_over_ranks", lambda self, values: values)
    rule_name, options = RULES[name]
    infos = {key: MatrixInfo(key, shape) for key, shape in SHAPES.items()}
    draw = torch.Generator().manual_seed(3)
    steps = [{key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()} for _ in range(5)]
    weights = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
    holdings = [
        [(i, Rect(key, *_rows(rows, rank, size), 0, cols)) for i, (key, (rows, cols)) in enumerate(SHAPES.items())]
        for rank in range(size)
    ]
    found: list[list[dict[str, Tensor]]] = [[] for _ in range(size)]
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        mailbox.local.rank = rank
        rule = registry.build(rule_name, options)
        fragments: Any = [SimpleNamespace(view=SimpleNamespace(counts=True), rects=[rect]) for _, rect in holdings[rank]]
        trips = Exchange(mailbox, rank, size)
        domain = Domain("threads", mailbox, rank, size, fragments, holdings, infos, trips)
        placed = MatrixPlan.make(domain, [Job.of(info, rule) for info in infos.values()], mode, bucket_bytes)
        step = MatrixStep(domain, placed, {key: rule for key in infos}, infos)
        step.init_states([weights[key][slice(*_rows(len(weights[key]), rank, size))].reshape(-1) for key in SHAPES])
        trips.traffic.sent.clear()
        for number, grads in enumerate(steps, 1):
            flats = [grads[key][slice(*_rows(len(grads[key]), rank, size))].reshape(-1).clone() for key in SHAPES]
            step.step(flats, {"b": 0.5}, {"e"} if number == 2 else set(), number)
            found[rank].append(
                {key: flat.view(-1, SHAPES[key][1]) for key, flat in zip(SHAPES, flats, strict=True)}
            )
        if mode != "owner" and name != "adam_mini":
            assert step.sliced and (mode == "group" or len(step.sliced) == len(infos))
        planned = {what: values[rank] for what, values in sent_in_a_step(domain, step).items()}
        skipped = {"between slices"} if "e" in step.sliced else set()  # step 2 has nothing of "e" to exchange
        for what, count in planned.items():
            if what not in skipped:
                assert trips.traffic.sent.get(what, 0) == len(steps) * count, what

    def guarded(rank: int) -> None:
        try:
            run(rank)
        except BaseException as error:
            failed.append(error)
            mailbox.barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise next((e for e in failed if not isinstance(e, threading.BrokenBarrierError)), failed[0])
    rule = registry.build(rule_name, options)
    states = {key: rule.init_state(weights[key].clone(), infos[key]) for key in infos}
    tolerance = 0.05 if "bf16" in name else 1e-4
    for number, grads in enumerate(steps, 1):
        for key, info in infos.items():
            got = torch.cat([found[rank][number - 1][key] for rank in range(size)])
            if key == "e" and number == 2:
                assert not got.any()
                continue
            grad = grads[key] * (0.5 if key == "b" else 1.0)
            (wanted,) = rule.update([grad.clone()], [states[key]], number, [info])
            assert float((got - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-12, (key, number)
