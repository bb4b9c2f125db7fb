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

from megatron_opt import patches
from megatron_opt.checkpointing import agreement
from megatron_opt.checkpointing.background import Writer
from megatron_opt.distributed.state import tensors_in_place
from megatron_opt.layout.quantized import is_quantized

_CONSTANT_PREFIX = "optimizer."  # state that only the optimizer's step changes


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
    in_place: list[Any] | None = None  # the tensors, where all are the model's and the optimizer's own memory
    constant_until_step: list[bool] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)  # of that memory


@dataclass
class Request:
    """A save that is ready to be handed to the writer; what Megatron takes for its own request."""

    folder: Path
    plan: Plan
    strings: list[bytes]
    tensors: list[Any]
    constant_until_step: list[bool]
    config: Any  # Megatron's note on the format
    finalize_fns: list[Callable[[], None]] = field(default_factory=list)  # collective, and done by rank 0's writer
    announcements: list[Callable[[], None]] = field(default_factory=list)  # once it is published

    def add_finalize_fn(self, function: Callable[[], None]) -> None:
        """What Megatron wants done once the checkpoint is there."""
        self.announcements.append(function)


@dataclass
class _Rest:
    """An optimizer without its tensors."""

    optimizer: Any
    is_stub_optimizer: bool = False

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.optimizer.state_dict()


def _is_tensor(entry: Any) -> bool:
    return hasattr(entry, "dtype")


def _structure(flat: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        key: [(tuple(e.data.shape), e.data.dtype, tuple(e.global_offset)) if _is_tensor(e) else None for e in entries]
        for key, entries in flat.items()
    }


class Snapshots:
    """What this rank writes at a background save: Megatron's plan of the first one, and where its values are."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.repeats = False  # whether the save that is being prepared is the last one again, with new values
        self.waits: list[float] = []
        self.model: list[Any] = []  # the model's parameters and buffers
        self.parameters: set[int] = set()  # storages of the parameters, which the optimizer's step alone changes
        self.optimizer: Any = None
        self.has_only_empty_objects = False  # whether all the model's own objects are empty
        self.seen: dict[Any, Any] = {}  # a plan's tensors by index, as Megatron finds them
        self.saved_empty_objects: dict[int, bytes] = {}  # what is saved of n empty objects

    def install(self, writer: Writer) -> None:
        """Put plans that last in the place of Megatron's; before process groups are there."""

        def wrap(target: str, make: Callable[[Any], Any]) -> None:
            patches.wrap(f"megatron.{target}", "checkpointing/snapshot.py", make)

        strategies = "core.dist_checkpointing.strategies"
        wrap(f"{strategies}.filesystem_async._results_queue", lambda _: queue.SimpleQueue())  # not used
        wrap("training.initialize.init_persistent_async_worker", lambda _: lambda *args, **kwargs: None)
        wrap(f"{strategies}.torch.TorchDistSaveShardedStrategy.async_save", self._planned_once)
        wrap(f"{strategies}.torch.MCoreSavePlanner.resolve_data", self._noting)
        wrap("training.checkpointing.generate_state_dict", self._shortened)
        wrap("training.training.get_forward_backward_func", lambda schedules: self._settled(schedules, writer))

    def repeatable(self, optimizer: Any) -> bool:
        """Whether the next save may be the last one again: the same tensors at the same places."""
        return (
            self.plan is not None
            and self.plan.in_place is not None
            and self._addresses(optimizer) == self.plan.addresses
        )

    def prepare(self, model: Any, optimizer: Any, repeat: bool) -> None:
        """Before Megatron's part of a save."""
        from megatron.core.utils import unwrap_model

        self.repeats, self.optimizer = repeat, optimizer
        if not repeat:
            chunks = unwrap_model(list(model))  # Megatron's wrapper has something else called buffers
            self.model = [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
            self.parameters.clear()
            self.parameters.update(p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters())

    def done(self) -> None:
        """After it."""
        self.repeats = False

    def waited(self) -> float:
        """Seconds that steps have waited for a copy since the last call."""
        seconds = sum(self.waits)
        self.waits.clear()
        return seconds

    def _settled(self, original: Callable[..., Any], writer: Writer) -> Callable[..., Any]:
        """Megatron's schedules, after which the optimizer may change what is being copied."""

        @functools.wraps(original)
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            schedule = original(*args, **kwargs)

            @functools.wraps(schedule)
            def run(*positional: Any, **named: Any) -> Any:
                losses = schedule(*positional, **named)
                began = time.monotonic()
                writer.settle()
                self.waits.append(time.monotonic() - began)
                return losses

            return run

        return get_forward_backward_func

    def _addresses(self, optimizer: Any) -> list[int]:
        """Of everything that the model and the optimizer keep."""
        return [tensor.data_ptr() for tensor in (*self.model, *tensors_in_place(optimizer))]

    def _shortened(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's `generate_state_dict`: without model and tensors where a save repeats the last one."""
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        @functools.wraps(original)
        def generate(args: Any, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
            if self.repeats:
                return original(args, [], _Rest(optimizer), *rest, **named)
            state = original(args, model, optimizer, *rest, **named)
            models = [value for key, value in state.items() if key.startswith("model")]
            self.has_only_empty_objects = all(
                entry.data is None for entry in nested_values(models) if isinstance(entry, ShardedObject)
            )
            return state

        return generate

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def resolve_data(planner: Any, item: Any) -> Any:
            resolved = original(planner, item)
            if hasattr(resolved, "data_ptr"):
                self.seen[item.index] = resolved.detach()
            return resolved

        return resolve_data

    def _planned_once(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """In place of the strategy's `async_save`: the first one plans, later ones fill the same files anew."""
        from megatron.core.dist_checkpointing.core import CheckpointingConfig
        from megatron.core.dist_checkpointing.strategies import torch as strategies

        @functools.wraps(original)
        def async_save(strategy: Any, state: Any, folder: Path, async_strategy: str = "mcore") -> Request:
            config = CheckpointingConfig(strategy.backend, strategy.version)
            flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(state, strategy.keep_only_main_replica)
            if self.repeats:
                assert self.plan is not None and self.plan.in_place is not None
                os.makedirs(folder, exist_ok=True)
                return Request(
                    Path(folder),
                    self.plan,
                    self._objects(self.plan, flat),
                    self.plan.in_place,
                    self.plan.constant_until_step,
                    config,
                )
            structure = _structure(flat)
            if self.plan is not None and not agreement.anywhere(
                self.plan.sources is None or self.plan.structure != structure
            ):
                os.makedirs(folder, exist_ok=True)
                tensors, constant_until_step = self._filled(self.plan, flat)
                return Request(
                    Path(folder), self.plan, self._objects(self.plan, flat), tensors, constant_until_step, config
                )
            sources = {
                (e.data.data_ptr(), e.data.dtype, e.data.numel()): (key, number)
                for key, entries in flat.items()
                for number, e in enumerate(entries)
                if _is_tensor(e)
            }
            quantized = {
                (key, tuple(e.global_offset)): (key, number)
                for key, entries in flat.items()
                for number, e in enumerate(entries)
                if _is_tensor(e) and is_quantized(e.data)
            }
            self.seen.clear()
            planned: list[Any] = []
            strategy._get_save_and_finalize_callbacks = lambda *callbacks: planned.extend(callbacks)
            try:
                original(strategy, state, folder, async_strategy)
            finally:
                del strategy._get_save_and_finalize_callbacks
            writer, (_, metadata, _), _ = planned
            self.plan, tensors = self._planned(writer.write_buckets or [], sources, quantized, structure, metadata)
            self.seen.clear()
            return Request(
                Path(folder), self.plan, self._objects(self.plan, flat), tensors, self.plan.constant_until_step, config
            )

        return async_save

    def _planned(
        self,
        buckets: list[Any],
        sources: dict[Any, tuple[str, int]],
        quantized: dict[Any, tuple[str, int]],
        structure: Any,
        metadata: Any,
    ) -> tuple[Plan, list[Any]]:
        """Megatron's plan of a save, with each tensor's origin, and the tensors to be written this time.

        `sources` by memory, type and size; `quantized`, whose numbers are written to memory of their own, by key and place.
        """
        import torch

        plan = Plan([], [], structure, metadata, {})
        tensors, originals = [], []
        for _, name, (objects, values) in buckets:
            plan.items.append((name, [item for item, _ in objects], [item for item, _ in values]))
            plan.constants.update({item.index.fqn: data.getvalue() for item, data in objects})
            tensors += [tensor for _, tensor in values]
            originals += [self.seen.get(item.index) for item, _ in values]
        indices = [item.index for _, _, items in plan.items for item in items]
        origins = [
            None if tensor is None or not tensor.data_ptr()
            else sources.get((tensor.data_ptr(), tensor.dtype, tensor.numel()))
            or quantized.get((index.fqn, tuple(index.offset or ())))
            for tensor, index in zip(originals, indices, strict=True)
        ]  # fmt: skip
        plan.sources = None if None in origins else [
            _Source(*origin, tuple(tensor.shape))
            for origin, tensor in zip(origins, originals, strict=True) if origin is not None and tensor is not None
        ]  # fmt: skip
        if self.has_only_empty_objects and hasattr(self.optimizer, "element_steps"):
            kept = {tensor.untyped_storage().data_ptr() for tensor in (*self.model, *tensors_in_place(self.optimizer))}
            plain = all(
                type(tensor) is torch.Tensor for tensor in originals
            )  # quantized parameters are saved as other values
            if plain and all(tensor.untyped_storage().data_ptr() in kept for tensor in originals if tensor is not None):
                plan.in_place, plan.addresses, tensors = originals, self._addresses(self.optimizer), originals
        plan.constant_until_step = [
            self._is_constant_until_step(index.fqn, tensor) for index, tensor in zip(indices, tensors, strict=True)
        ]
        return plan, tensors

    def _objects(self, plan: Plan, flat: dict[str, list[Any]]) -> list[bytes]:
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
            if empty not in self.saved_empty_objects:
                stream = io.BytesIO()
                torch.save(values, stream)
                strings.append(stream.getvalue())
                if empty:
                    self.saved_empty_objects[empty] = strings[-1]
            else:
                strings.append(self.saved_empty_objects[empty])
        return strings

    def _filled(self, plan: Plan, flat: dict[str, list[Any]]) -> tuple[list[Any], list[bool]]:
        tensors, constant_until_step = [], []
        for source in plan.sources or []:
            value = flat[source.key][source.number].data.detach()
            tensors.append((value.dequantize() if is_quantized(value) else value).view(source.shape))
            constant_until_step.append(self._is_constant_until_step(source.key, tensors[-1]))
        return tensors, constant_until_step

    def _is_constant_until_step(self, name: str, tensor: Any) -> bool:
        return name.startswith(_CONSTANT_PREFIX) or tensor.untyped_storage().data_ptr() in self.parameters
