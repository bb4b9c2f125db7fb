"""Background saves: what Megatron plans at the first one is reused, and its worker replaced by `background.Writer`.

A later save of the same structure needs no plan: its files hold the same items, taken from the same tensors. Where these
are the model's and the optimizer's own memory it needs no description of them either, only of the small rest.
"""

import functools
import io
import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_opt.checkpointing import agreement
from megatron_opt.checkpointing.background import Writer
from megatron_opt.distributed.state import live_tensors

_CONSTANT_PREFIX = "optimizer."  # state that only the optimizer's step changes

_plan: "Plan | None" = None
_repeat = False  # whether the save that is being prepared is the last one again, with new values
_waits: list[float] = []
_model: list[Any] = []  # the model's parameters and buffers
_parameters: set[int] = set()  # storages of the parameters, which the optimizer's step alone changes
_optimizer: Any = None
_hollow = False  # whether all the model's own objects are empty
_seen: dict[Any, Any] = {}  # a plan's tensors by index, as Megatron finds them
_nothing: dict[int, bytes] = {}  # what is saved of n empty objects


@dataclass(frozen=True)
class _Source:
    """Where an item's value comes from: the n-th entry under a key, and the shape it is saved in."""

    key: str
    number: int
    shape: tuple[int, ...]


@dataclass
class Plan:
    """What this rank writes, file by file, and where it comes from."""

    items: list[tuple[str, list[Any], list[Any]]]
    sources: list[_Source] | None  # None: some tensor could not be traced, and the next save is planned anew
    structure: dict[str, list[Any]]
    metadata: Any  # torch's, on rank 0
    constants: dict[str, bytes]  # objects as they were when this was planned
    live: list[Any] | None = None  # the tensors, where all are the model's and the optimizer's own memory
    still: list[bool] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)  # of that memory


@dataclass
class Request:
    """A save that is ready to be handed to the writer; what Megatron takes for its own request."""

    folder: Path
    plan: Plan
    strings: list[bytes]
    tensors: list[Any]
    still: list[bool]
    config: Any  # Megatron's note on the format
    finalize_fns: list[Callable[[], None]] = field(default_factory=list)  # collective, and done by rank 0's writer
    announcements: list[Callable[[], None]] = field(default_factory=list)  # once it is published

    def add_finalize_fn(self, function: Callable[[], None]) -> None:
        """What Megatron wants done once the checkpoint is there."""
        self.announcements.append(function)


def install(writer: Writer) -> None:
    """Put plans that last in the place of Megatron's; before process groups are there."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, TorchDistSaveShardedStrategy
    from megatron.training import checkpointing, initialize, training

    filesystem_async._results_queue = queue.SimpleQueue()  # not used
    initialize.init_persistent_async_worker = lambda *args, **kwargs: None
    TorchDistSaveShardedStrategy.async_save = _planned_once(TorchDistSaveShardedStrategy.async_save)
    MCoreSavePlanner.resolve_data = _noting(MCoreSavePlanner.resolve_data)
    checkpointing.generate_state_dict = _shortened(checkpointing.generate_state_dict)
    training.get_forward_backward_func = _settled(training.get_forward_backward_func, writer)


def repeatable(optimizer: Any) -> bool:
    """Whether the next save may be the last one again: the same tensors at the same places."""
    return _plan is not None and _plan.live is not None and _addresses(optimizer) == _plan.addresses


def prepare(model: Any, optimizer: Any, repeat: bool) -> None:
    """Before Megatron's part of a save."""
    from megatron.core.utils import unwrap_model

    global _repeat, _optimizer, _model
    _repeat, _optimizer = repeat, optimizer
    if not repeat:
        chunks = unwrap_model(list(model))  # Megatron's wrapper has something else called buffers
        _model = [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
        _parameters.clear()
        _parameters.update(p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters())


def done() -> None:
    """After it."""
    global _repeat
    _repeat = False


def waited() -> float:
    """Seconds that steps have waited for a copy since the last call."""
    found = sum(_waits)
    _waits.clear()
    return found


def _settled(original: Callable[..., Any], writer: Writer) -> Callable[..., Any]:
    """Megatron's schedules, after which the optimizer may change what is being copied."""

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        schedule = original(*args, **kwargs)

        @functools.wraps(schedule)
        def run(*positional: Any, **named: Any) -> Any:
            found = schedule(*positional, **named)
            began = time.monotonic()
            writer.settle()
            _waits.append(time.monotonic() - began)
            return found

        return run

    return get_forward_backward_func


def _addresses(optimizer: Any) -> list[int]:
    """Of everything that the model and the optimizer keep."""
    return [tensor.data_ptr() for tensor in (*_model, *live_tensors(optimizer))]


@dataclass
class _Rest:
    """An optimizer without its tensors."""

    optimizer: Any
    is_stub_optimizer: bool = False

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.optimizer.state_dict()


def _shortened(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `generate_state_dict`: without model and tensors where a save repeats the last one."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    @functools.wraps(original)
    def generate(args: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
        global _hollow
        if _repeat:
            return original(args, [], _Rest(optimizer), *rest, **named)
        found = original(args, model, optimizer, *rest, **named)
        models = [value for key, value in found.items() if key.startswith("model")]
        _hollow = all(entry.data is None for entry in nested_values(models) if isinstance(entry, ShardedObject))
        return found

    return generate


# ---- plans


def _noting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resolve_data(self: Any, item: Any) -> Any:
        found = original(self, item)
        if hasattr(found, "data_ptr"):
            _seen[item.index] = found.detach()
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
    from megatron.core.dist_checkpointing.core import CheckpointingConfig
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    @functools.wraps(original)
    def async_save(self: Any, state: Any, folder: Path, async_strategy: str = "mcore") -> Request:
        global _plan
        config = CheckpointingConfig(self.backend, self.version)
        flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(state, self.keep_only_main_replica)
        if _repeat:
            assert _plan is not None and _plan.live is not None
            os.makedirs(folder, exist_ok=True)
            return Request(Path(folder), _plan, _objects(_plan, flat), _plan.live, _plan.still, config)
        structure = _structure(flat)
        if _plan is not None and not agreement.anywhere(_plan.sources is None or _plan.structure != structure):
            os.makedirs(folder, exist_ok=True)
            tensors, still = _filled(_plan, flat)
            return Request(Path(folder), _plan, _objects(_plan, flat), tensors, still, config)
        sources = {
            (e.data.data_ptr(), e.data.dtype, e.data.numel()): (key, number)
            for key, entries in flat.items()
            for number, e in enumerate(entries)
            if _is_tensor(e)
        }
        _seen.clear()
        planned: list[Any] = []
        self._get_save_and_finalize_callbacks = lambda *found: planned.extend(found)
        try:
            original(self, state, folder, async_strategy)
        finally:
            del self._get_save_and_finalize_callbacks
        writer, (_, metadata, _), _ = planned
        _plan, tensors = _planned(writer.write_buckets or [], sources, structure, metadata)
        _seen.clear()
        return Request(Path(folder), _plan, _objects(_plan, flat), tensors, _plan.still, config)

    return async_save


def _planned(
    buckets: list[Any], sources: dict[Any, tuple[str, int]], structure: Any, metadata: Any
) -> tuple[Plan, list[Any]]:
    """Megatron's plan of a save, with each tensor's origin, and the tensors to be written this time."""
    import torch

    plan = Plan([], [], structure, metadata, {})
    tensors, found = [], []
    for _, name, (objects, values) in buckets:
        plan.items.append((name, [item for item, _ in objects], [item for item, _ in values]))
        plan.constants.update({item.index.fqn: data.getvalue() for item, data in objects})
        tensors += [tensor for _, tensor in values]
        found += [_seen.get(item.index) for item, _ in values]
    names = [item.index.fqn for _, _, items in plan.items for item in items]
    origins = [
        None if tensor is None or not tensor.data_ptr()
        else sources.get((tensor.data_ptr(), tensor.dtype, tensor.numel())) for tensor in found
    ]  # fmt: skip
    plan.sources = None if None in origins else [
        _Source(*origin, tuple(tensor.shape))
        for origin, tensor in zip(origins, found, strict=True) if origin is not None and tensor is not None
    ]  # fmt: skip
    if _hollow and hasattr(_optimizer, "element_steps"):
        kept = {tensor.untyped_storage().data_ptr() for tensor in (*_model, *live_tensors(_optimizer))}
        plain = all(type(tensor) is torch.Tensor for tensor in found)  # quantized parameters are saved as other values
        if plain and all(tensor.untyped_storage().data_ptr() in kept for tensor in found if tensor is not None):
            plan.live, plan.addresses, tensors = found, _addresses(_optimizer), found
    plan.still = [_keeps_still(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    return plan, tensors


def _objects(plan: Plan, flat: dict[str, list[Any]]) -> list[bytes]:
    """What is not a tensor, as Megatron stores it; most are empty extra states."""
    import torch

    strings = []
    for item in (item for _, objects, _ in plan.items for item in objects):
        entries = flat.get(item.index.fqn)
        if entries is None:  # of the model, in a save that repeats the last one
            strings.append(plan.constants[item.index.fqn])
            continue
        values = [entry.data for entry in entries]
        empty = len(values) if all(value is None for value in values) else 0
        if empty not in _nothing:
            stream = io.BytesIO()
            torch.save(values, stream)
            strings.append(stream.getvalue())
            if empty:
                _nothing[empty] = strings[-1]
        else:
            strings.append(_nothing[empty])
    return strings


def _filled(plan: Plan, flat: dict[str, list[Any]]) -> tuple[list[Any], list[bool]]:
    tensors, still = [], []
    for source in plan.sources or []:
        tensors.append(flat[source.key][source.number].data.detach().view(source.shape))
        still.append(_keeps_still(source.key, tensors[-1]))
    return tensors, still


def _keeps_still(name: str, tensor: Any) -> bool:
    return name.startswith(_CONSTANT_PREFIX) or tensor.untyped_storage().data_ptr() in _parameters
