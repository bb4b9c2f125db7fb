"""Background saves: what Megatron plans at the first one is reused, and its worker replaced by `background.Writer`.

A later save of the same structure needs no plan: its files hold the same items, taken from the same tensors.
"""

import functools
import io
import math
import os
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt.training import agreement
from megatron_opt.training.background import Publication, Writer

_CONSTANT_PREFIX = "optimizer."  # state that only the optimizer's step changes

_writer: Writer | None = None
_plan: "_Plan | None" = None
_metadata: Any = None  # torch's, of the last plan
_scheduled: deque[Any] = deque()  # the same of each save that is being written
_waits: list[float] = []
_copies: list[Callable[[], Any]] = []  # of state into the tensors of the save that is being prepared
_parameters: set[int] = set()  # storages of the model's parameters, changed by the optimizer's step alone
_seen: dict[Any, tuple[int, Any, tuple[int, ...]]] = {}  # a plan's tensors: address, type, shape by index


def install(nice: int) -> None:
    """Fork the writer, and put it in the place of Megatron's; before threads and process groups are there."""
    global _writer
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, TorchDistSaveShardedStrategy
    from megatron.training import async_utils as training_async
    from megatron.training import initialize, training

    from megatron_opt.distributed.exchange import Exchange

    _writer = Writer(nice)

    class Caller(_Caller, async_utils.AsyncCaller):
        pass

    class Queue(async_utils.AsyncCallsQueue):
        """Megatron's, which closes its worker at the end of training and starts another for the last save."""

        def _get_async_caller(self) -> Caller:
            return caller

    caller = Caller()
    filesystem_async._results_queue = queue.SimpleQueue()  # not used
    training_async._async_calls_queue = Queue()
    initialize.init_persistent_async_worker = lambda *args, **kwargs: None
    TorchDistSaveShardedStrategy.async_save = _planned_once(TorchDistSaveShardedStrategy.async_save)
    MCoreSavePlanner.resolve_data = _noting(MCoreSavePlanner.resolve_data)
    Exchange.gather = _put_off(Exchange.gather)  # type: ignore[method-assign]
    training.get_forward_backward_func = _settled(training.get_forward_backward_func)


def remember_parameters(model: Any) -> None:
    """Before a save: which tensors will keep still until the next update."""
    _parameters.clear()
    _parameters.update(p.untyped_storage().data_ptr() for chunk in model for p in chunk.parameters())


def _settled(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's schedules, after which the optimizer may change what is being copied."""

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        schedule = original(*args, **kwargs)

        @functools.wraps(schedule)
        def run(*positional: Any, **named: Any) -> Any:
            found = schedule(*positional, **named)
            assert _writer is not None
            began = time.monotonic()
            _writer.settle()
            _waits.append(time.monotonic() - began)
            return found

        return run

    return get_forward_backward_func


def _put_off(original: Callable[..., Any]) -> Callable[..., Any]:
    """The exchange's `gather`: where a rank keeps all of a checkpoint's state itself, the copying thread puts it together."""
    from megatron_opt.distributed.exchange import Trip

    @functools.wraps(original)
    def gather(self: Any, route: Any, shards: Any, slabs: Any, what: str = "gradients to owners", wire: Any = None) -> Any:
        whole = what == "state to checkpoint" and self.size == 1 and _plan is not None and _plan.sources is not None
        if not whole or any(tensor.is_cuda for tensor in shards):
            return original(self, route, shards, slabs, what, wire)
        _copies.append(functools.partial(original, self, route, shards, slabs, what, wire))
        return Trip(None, None, [])

    return gather


def waited() -> float:
    """Seconds that steps have waited for a copy since the last call."""
    found = sum(_waits)
    _waits.clear()
    return found


def outcome() -> tuple[str | None, bytes, Any]:
    """(what went wrong on this rank, its writer's results, torch's metadata) of the oldest save that is written."""
    assert _writer is not None
    if not _scheduled:  # nothing to write on this rank
        return None, b"", None
    return *_writer.written(), _scheduled.popleft()


def publish(what: Publication) -> None:
    """Rank 0: have its writer make a checkpoint visible."""
    assert _writer is not None
    _writer.publish(what)


def published(block: bool) -> dict[str, Any] | str | None:
    """Rank 0: see `Writer.published`."""
    assert _writer is not None
    return _writer.published(block)


class _Caller:
    """Megatron's AsyncCaller: it asks at every step whether the writers of all ranks are done."""

    sync_all_async_calls: Callable[[int], bool]

    def schedule_async_call(self, request: Any) -> None:
        if request.async_fn is None:
            return
        if request.async_fn is not _write:  # something else to be done in the background
            request.async_fn(*request.async_fn_args, **request.async_fn_kwargs)
            return
        _write(*request.async_fn_args)

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        assert _writer is not None
        if blocking:
            _writer.wait()
        busy = _writer.busy()
        return not busy if no_dist else self.sync_all_async_calls(int(busy))

    def close(self, abort: bool = False) -> None:
        if _writer is not None and not abort:
            _writer.wait()

    def __del__(self) -> None:
        """Megatron's base class asks for one."""


def _write(folder: Path, rank: int, plan: "_Plan", values: "_Values") -> None:
    assert _writer is not None
    _scheduled.append(_metadata)
    copies = list(_copies)
    _copies.clear()
    _writer.save(folder, rank, plan.items, values.strings, values.tensors, values.still, copies)


# ---- plans


@dataclass(frozen=True)
class _Source:
    """Where an item's value comes from: the n-th entry under a key, and the shape it is saved in."""

    key: str
    number: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    items: list[tuple[str, list[Any], list[Any]]]
    sources: list[_Source] | None  # None: some tensor could not be traced, and the next save is planned anew
    structure: dict[str, list[Any]]


@dataclass(frozen=True)
class _Values:
    strings: list[bytes]
    tensors: list[Any]
    still: list[bool]


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resolve_data(self: Any, item: Any) -> Any:
        found = original(self, item)
        if hasattr(found, "data_ptr"):
            _seen[item.index] = found.data_ptr(), found.dtype, tuple(found.shape)
        return found

    return resolve_data


def _is_tensor(entry: Any) -> bool:
    return hasattr(entry, "dtype")


def _structure(flat: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        key: [(tuple(e.data.shape), e.data.dtype, tuple(e.global_offset)) if _is_tensor(e) else None for e in entries]
        for key, entries in flat.items()
    }


def _planned_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the strategy's `async_save`: the first one plans, later ones fill the same files anew."""
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

    @functools.wraps(original)
    def async_save(self: Any, state: Any, folder: Path, async_strategy: str = "mcore") -> Any:
        global _metadata, _plan
        flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(state, self.keep_only_main_replica)
        structure = _structure(flat)
        rank = agreement.rank()
        if _plan is not None and not agreement.anywhere(_plan.sources is None or _plan.structure != structure):
            os.makedirs(folder, exist_ok=True)
            return AsyncRequest(_write, (Path(folder), rank, _plan, _filled(_plan, flat)), [])
        for copy in _copies:
            copy()
        _copies.clear()
        sources = {
            (e.data.data_ptr(), e.data.dtype, e.data.numel()): (key, number)
            for key, entries in flat.items() for number, e in enumerate(entries) if _is_tensor(e)
        }
        _seen.clear()
        planned: list[Any] = []
        self._get_save_and_finalize_callbacks = lambda *found: planned.extend(found)
        try:
            original(self, state, folder, async_strategy)
        finally:
            del self._get_save_and_finalize_callbacks
        writer, (_, _metadata, _), _ = planned
        _plan, values = _planned(writer.write_buckets or [], sources, structure)
        if not _plan.items:
            return AsyncRequest(None, (), [])
        return AsyncRequest(_write, (Path(folder), rank, _plan, values), [])

    return async_save


def _planned(buckets: list[Any], sources: dict[Any, tuple[str, int]], structure: Any) -> tuple[_Plan, _Values]:
    """Megatron's plan of a save, with each tensor's origin, and what is to be written this time."""
    items, strings, tensors, still = [], [], [], []
    traced: list[_Source] | None = []
    for _, name, (objects, values) in buckets:
        items.append((name, [item for item, _ in objects], [item for item, _ in values]))
        strings += [data.getvalue() for _, data in objects]
        for item, tensor in values:
            tensors.append(tensor)
            still.append(_keeps_still(item.index.fqn, tensor))
            address, kind, shape = _seen.get(item.index, (0, None, ()))
            source = sources.get((address, kind, math.prod(shape)))
            if source is None or not address:
                traced = None
            elif traced is not None:
                traced.append(_Source(*source, shape))
    return _Plan(items, traced, structure), _Values(strings, tensors, still)


def _filled(plan: _Plan, flat: dict[str, list[Any]]) -> _Values:
    import torch

    strings, tensors, still = [], [], []
    nothing: dict[int, bytes] = {}  # most objects are empty extra states
    for _, objects, _ in plan.items:
        for item in objects:
            values = [entry.data for entry in flat[item.index.fqn]]
            empty = len(values) if all(value is None for value in values) else 0
            if empty not in nothing:
                stream = io.BytesIO()
                torch.save(values, stream)
                strings.append(stream.getvalue())
                if empty:
                    nothing[empty] = strings[-1]
            else:
                strings.append(nothing[empty])
    for source in plan.sources or []:
        tensor = flat[source.key][source.number].data.detach().view(source.shape)
        tensors.append(tensor)
        still.append(_keeps_still(source.key, tensor))
    return _Values(strings, tensors, still)


def _keeps_still(name: str, tensor: Any) -> bool:
    return name.startswith(_CONSTANT_PREFIX) or tensor.untyped_storage().data_ptr() in _parameters
