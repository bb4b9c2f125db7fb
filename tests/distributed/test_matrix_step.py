"""The matrix step on ranks that are threads: every way of computing against the rule on whole matrices, and its state."""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opt.distributed import exchange as exchange_module
from megatron_opt.distributed import state
from megatron_opt.distributed.compute_shards import shape2d
from megatron_opt.distributed.exchange import Exchange
from megatron_opt.distributed.jobs import Job
from megatron_opt.distributed.matrix_step import MatrixStep
from megatron_opt.distributed.param_shards import Rect
from megatron_opt.distributed.planning import sent_in_a_step
from megatron_opt.distributed.shard_group import MatrixPlan, ShardGroup
from megatron_opt.engine_options import EngineOptions
from megatron_opt.layout.region import Region
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", {"fp32_matmul_prec": "high"}),
    "scion-bf16": ("scion", {"fp32_matmul_prec": "medium"}),
    "soap": ("soap", {"one_sided": True, "precondition_frequency": 2, "factor_precision": "fp64", "eps": 1e-6}),
    "soap-blocks": ("soap", {"block_size": 8, "precondition_frequency": 2, "factor_precision": "fp64", "eps": 1e-6}),
    "soap-strips": (
        "soap",
        {"block_size": 8, "one_sided": True, "precondition_frequency": 2, "factor_precision": "fp64", "eps": 1e-6},
    ),
    "adam_mini": ("adam_mini", {}),
    "normuon": ("muon", {"fp32_matmul_prec": "high", "normuon": True}),
    "muon_h": ("muon_h", {"fp32_matmul_prec": "high"}),
    "soap_h-blocks": (
        "soap_h",
        {"block_size": 8, "precondition_frequency": 2, "factor_precision": "fp64", "eps": 1e-6},
    ),
    "adam_h": ("adam_h", {}),
    "shampoo-blocks": ("shampoo", {"grafting": "none", "block_size": 8, "precondition_frequency": 2, "damping": 1e-2}),
    "kl_shampoo": ("kl_shampoo", dict(block_size=8, precondition_frequency=3)),
}
SHAPES: dict[str, tuple[int, ...]] = {"a": (12, 30), "b": (24, 24), "c": (40, 6), "d": (8, 70), "e": (16, 20)}
VECTORS = {"f": (30,)}  # where the rule takes them


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

    @property
    def sum_over_ranks(self) -> Any:
        return lambda shard_group, values: torch.stack(self.gather_objects(values, None, 0)).sum(0)

    def gather_objects(self, value: Any, group: Any, size: int) -> list[Any]:
        self.posted[self.local.rank] = value
        self.barrier.wait()
        found = list(self.posted)
        self.barrier.wait()
        return found


def _rows(length: int, rank: int, size: int) -> slice:
    return slice(length * rank // size, length * (rank + 1) // size)


class Ranks:
    """A matrix step on each of some threads, which hold equal shares of every matrix's rows."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, size: int, mode: str, bucket_bytes: float = 1e9) -> None:
        self.size, self.mailbox = size, Mailbox(size)
        patch.setattr(exchange_module.dist, "all_to_all_single", self.mailbox.all_to_all_single)
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(ShardGroup, "sum_over_ranks", self.mailbox.sum_over_ranks)
        patch.setattr(state, "gather_objects", self.mailbox.gather_objects)
        self.name, self.mode, self.bucket_bytes = name, mode, bucket_bytes
        self.infos = {key: MatrixInfo(key, shape) for key, shape in _shapes(name).items()}
        self.holdings = []
        for rank in range(size):
            rows = [_rows(info.shape[0], rank, size) for info in self.infos.values()]
            self.holdings.append(
                [(i, Rect(key, Region(rows[i].start, rows[i].stop, 0, shape2d(info)[1])))
                 for i, (key, info) in enumerate(self.infos.items())]
            )  # fmt: skip
        self.steps: list[Any] = self.run(self._make)

    def _make(self, rank: int) -> MatrixStep:
        rule_name, options = RULES[self.name]
        optimizer = registry.build(rule_name, options)
        param_shards: Any = [
            SimpleNamespace(
                view=SimpleNamespace(counts=True, param=SimpleNamespace(dtype=torch.float32)), rects=[rect], state={}
            )
            for _, rect in self.holdings[rank]
        ]
        exchange = Exchange(self.mailbox, rank, self.size)
        shard_group = ShardGroup(
            "threads", self.mailbox, rank, self.size, param_shards, self.holdings, self.infos, exchange
        )
        jobs = [Job.of(info, optimizer) for info in self.infos.values()]
        placed = MatrixPlan.make(
            shard_group, jobs, EngineOptions(matrix_mode=self.mode, exchange_bucket_mb=self.bucket_bytes / 2**20)
        )
        return MatrixStep(shard_group, placed, dict.fromkeys(self.infos, optimizer), self.infos)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """The function's results on all ranks at once."""
        found: list[Any] = [None] * self.size
        failed: list[BaseException] = []

        def guarded(rank: int) -> None:
            self.mailbox.local.rank = rank
            try:
                found[rank] = function(rank)
            except BaseException as error:
                failed.append(error)
                self.mailbox.barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise next((e for e in failed if not isinstance(e, threading.BrokenBarrierError)), failed[0])
        return found

    def shares(self, matrices: dict[str, Tensor], rank: int) -> list[Tensor]:
        return [matrices[key][_rows(i.shape[0], rank, self.size)].reshape(-1).clone() for key, i in self.infos.items()]

    def begin(self, weights: dict[str, Tensor]) -> None:
        self.run(lambda rank: self.steps[rank].init_states(self.shares(weights, rank)))

    def step(self, grads: dict[str, Tensor], scale: dict[str, float], skip: set[str], number: int) -> dict[str, Tensor]:
        """Whole directions."""

        def one(rank: int) -> list[Tensor]:
            flats = self.shares(grads, rank)
            directions: list[Tensor] = self.steps[rank].step(flats, scale, skip, number)
            return directions

        flats = self.run(one)
        return {
            key: torch.cat([flats[rank][i] for rank in range(self.size)]).view(info.shape)
            for i, (key, info) in enumerate(self.infos.items())
        }

    def optimizer(self, rank: int) -> Any:
        """What the saving and loading of state sees of an optimizer."""
        step = self.steps[rank]
        return SimpleNamespace(
            ensure_states=lambda: None, shard_groups=[step.shard_group], matrix_steps=[step], groups=[], param_groups=[],
            group_optimizers=[], stored=[],
            element_steps=[SimpleNamespace(slices={})], step_number=5, device=torch.device("cpu"), param_shards=lambda: [],
            host=step.host, average=None,
        )  # fmt: skip


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    return SHAPES | (VECTORS if registry.optimizers()[RULES[name][0]].vectors else {})


def _matrices(draw: torch.Generator, name: str) -> dict[str, Tensor]:
    return {key: torch.randn(shape, generator=draw) for key, shape in _shapes(name).items()}


@pytest.mark.parametrize("mode", ["owner", "group", "sharded"])
@pytest.mark.parametrize("bucket_bytes", [1e9, 3000.0], ids=["one-bucket", "buckets"])
@pytest.mark.parametrize("name", RULES)
def test_every_mode_repeats_the_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, mode: str, bucket_bytes: float
) -> None:
    draw = torch.Generator().manual_seed(3)
    weights, steps = _matrices(draw, name), [_matrices(draw, name) for _ in range(5)]
    steps[0]["b"][:8], steps[0]["b"][:, 8:16] = 0.0, 0.0  # whole blocks without a first gradient
    ranks = Ranks(monkeypatch, name, 7, mode, bucket_bytes)  # more ranks than the shortest side is long
    ranks.begin(weights)
    if mode != "owner" and name != "adam_mini":
        cut = {
            submatrix.key[0]
            for submatrix in ranks.steps[0].placed.submatrices
            if len(submatrix.parts) > 1 or not submatrix.is_whole
        }
        assert cut and (mode == "group" or cut >= set(SHAPES))
    for step in ranks.steps:
        step.shard_group.exchange.traffic.sent.clear()
    optimizer = registry.build(*RULES[name])
    states = {key: optimizer.init_state(weights[key].clone(), info) for key, info in ranks.infos.items()}
    tolerance = 0.05 if "bf16" in name else 1e-4
    for number, grads in enumerate(steps, 1):
        skip = {"e"} if number == 2 else set()
        found = ranks.step(grads, {"b": 0.5}, skip, number)
        for key, info in ranks.infos.items():
            if key in skip:
                assert not found[key].any()
                continue
            grad = grads[key] * (0.5 if key == "b" else 1.0)
            (wanted,) = optimizer.update([grad.clone()], [states[key]], number, [info])
            assert float((found[key] - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-12, (key, number)
    for rank, step in enumerate(ranks.steps):
        skipped = (
            {"between shards"} if "e" in {name for name, _ in step.sharded} else set()
        )  # step 2 has nothing of "e" to exchange
        for what, counts in sent_in_a_step(step.shard_group, step).items():
            if what not in skipped:
                assert step.shard_group.exchange.traffic.sent.get(what, 0) == len(steps) * counts[rank], what


def test_the_next_bucket_travels_while_this_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bucket i + 1 starts to its owners before bucket i is computed, directions of bucket i − 1 are not waited for."""
    draw = torch.Generator().manual_seed(5)
    ranks = Ranks(monkeypatch, "muon", 2, "owner", 100.0)
    ranks.begin(_matrices(draw, "muon"))
    step, events = ranks.steps[0], []
    exchange = step.shard_group.exchange
    for name in ("gather", "scatter"):
        inner = getattr(exchange, name)

        def called(*args: Any, name: str = name, inner: Any = inner, **rest: Any) -> Any:
            events.append(name)
            return inner(*args, **rest)

        monkeypatch.setattr(exchange, name, called)
    compute = step._compute

    def computed(*args: Any) -> Any:
        events.append("compute")
        return compute(*args)

    monkeypatch.setattr(step, "_compute", computed)
    finish = exchange_module.AsyncTransfer.finish

    def finished(transfer: Any) -> None:
        if ranks.mailbox.local.rank == 0:
            events.append("wait")
        finish(transfer)

    monkeypatch.setattr(exchange_module.AsyncTransfer, "finish", finished)
    ranks.step(_matrices(draw, "muon"), {}, set(), 1)
    buckets = len(step.placed.buckets)
    assert buckets > 2
    turn = ["gather", "wait", "compute", "scatter"]
    assert events == ["gather", *turn * (buckets - 1), *turn[1:], *["wait"] * buckets]


@pytest.mark.parametrize("name", RULES)
def test_state_moves_to_another_way_of_computing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Slices on four ranks, whole matrices on three, slices on five: every tensor by value, the next steps the same."""
    monkeypatch.setattr(state, "_sharded", lambda piece, shard_group: piece)
    draw = torch.Generator().manual_seed(4)
    weights = _matrices(draw, name)
    source = Ranks(monkeypatch, name, 4, "group")
    source.begin(weights)
    for number in (1, 2, 3):
        source.step(_matrices(draw, name), {}, set(), number)
    for size, mode in ((3, "owner"), (5, "sharded"), (2, "group")):
        stored: dict[tuple[str, str], Tensor] = {}
        covered: dict[tuple[str, str], int] = {}
        for saved in source.run(lambda rank: state.sharded_state(source.optimizer(rank))["tensors"]):  # noqa: B023
            for piece in (piece for piece in saved.values() if not piece.replica):
                entry = piece.key, piece.matrix
                whole = stored.setdefault(
                    entry, piece.tensor.new_zeros(piece.shape if piece.rect else piece.tensor.shape)
                )
                _within(whole, piece).copy_(piece.tensor)
                covered[entry] = covered.get(entry, 0) + piece.tensor.numel()
        assert covered == {entry: tensor.numel() for entry, tensor in stored.items()}, "saved twice or not at all"
        target = Ranks(monkeypatch, name, size, mode)
        target.begin(weights)

        def load(rank: int) -> set[tuple[str, str]]:
            optimizer = target.optimizer(rank)  # noqa: B023
            room = state.sharded_state(optimizer)
            filled = {key: _within(stored[p.key, p.matrix], p).clone() for key, p in room["tensors"].items()}  # noqa: B023
            wanted = {(p.key, p.matrix) for p in room["tensors"].values()}
            state.load_state(optimizer, {**room, "tensors": filled})
            return wanted

        assert set().union(*target.run(load)) == set(stored)
        grads = _matrices(draw, name)
        source = _again(monkeypatch, source)
        ahead = source.step({key: grad.clone() for key, grad in grads.items()}, {}, set(), 4)
        target = _again(monkeypatch, target)
        found = target.step(grads, {}, set(), 4)
        for key, wanted in ahead.items():
            assert float((found[key] - wanted).norm()) <= (0.05 if "bf16" in name else 1e-4) * float(wanted.norm()), key
        source = target


def _within(whole: Tensor, piece: state.StateEntry) -> Tensor:
    """Where a piece lies in its whole."""
    if piece.rect is None:
        return whole
    return piece.rect.region.of(whole)


def _again(patch: pytest.MonkeyPatch, ranks: Ranks) -> Ranks:
    """The threads whose turn it is."""
    patch.setattr(exchange_module.dist, "all_to_all_single", ranks.mailbox.all_to_all_single)
    patch.setattr(state, "gather_objects", ranks.mailbox.gather_objects)
    patch.setattr(ShardGroup, "sum_over_ranks", ranks.mailbox.sum_over_ranks)
    return ranks
