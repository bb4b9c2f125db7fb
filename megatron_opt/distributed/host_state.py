"""Optimizer state in host memory (--optimizer-cpu-offload), on the device while it is stepped.

It comes batch by batch, the next while one is computed, and what was computed goes back while the next is. Batches take turns
in two buffers, so that no more of it is on the device than two batches hold.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opt.optimizers.base import State

_ALIGNED = 256  # bytes, as the allocator of a GPU has it


class Resting(dict[str, Tensor]):
    """A state of which some tensors rest in host memory: `home`, which are its own entries but in a step."""

    def __init__(self, state: State, home: dict[str, Tensor]) -> None:
        super().__init__(state | home)
        self.home = home


class HostStates:
    """States of which `fraction` of the bytes rests in host memory (pinned beside a GPU), alike in every stretch of them.

    `batch_bytes` is what a batch is to hold at most, `moved` are bytes since the start, `most` is the most of state on the
    device that had come from the host.
    """

    def __init__(self, device: torch.device, fraction: float = 0.0, batch_bytes: float = 0.0) -> None:
        self.device, self.fraction, self.batch_bytes = device, fraction, batch_bytes
        self.moved = {"to the device": 0, "to the host": 0}
        self.most = 0
        self._seen, self._kept, self._here = 0, 0, 0  # bytes of states, of those the ones at rest, on the device
        self._pinned = device.type == "cuda" and torch.cuda.is_available()
        self._streams = tuple(torch.cuda.Stream() for _ in self.moved) if self._pinned else ()

    def rest(self, state: State) -> State:
        """A new state, its share of tensors in host memory; single numbers stay where they are."""
        home = {}
        for name, tensor in state.items() if self.fraction else ():
            size = _bytes(tensor) if tensor.numel() > 1 else 0
            self._seen += size
            if size and self._kept + size / 2 <= self.fraction * self._seen:
                self._kept += size
                home[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._pinned).copy_(tensor)
        return Resting(state, home) if home else state

    def settle(self) -> None:
        """Wait until host memory has what the last step computed; before the host reads or writes it."""
        for stream in self._streams:
            stream.synchronize()

    def stream(self, batches: Sequence[Sequence[State]], back: bool = True) -> Iterator[int]:
        """Number of each batch while its states are on the device; asking for the next sends them back, if `back`."""
        resting = [[state for state in states if isinstance(state, Resting)] for states in batches]
        sizes = [sum(_room(t) for state in states for t in state.home.values()) for states in resting]
        if not any(sizes):
            yield from range(len(batches))
            return
        halves = [torch.empty(max(sizes[half::2], default=0), dtype=torch.uint8, device=self.device) for half in (0, 1)]
        arrived: list[Any] = []
        left: list[Any] = []
        self._follow(*self._streams)  # the buffers' memory, and what the step has done so far
        for number in range(-1, len(batches)):
            if number + 1 < len(batches):
                before = left[number - 1] if number > 0 else None
                arrived.append(self._fetch(resting[number + 1], halves[(number + 1) % 2], before))
            if number < 0:
                continue
            if arrived[number] is not None:
                torch.cuda.current_stream().wait_event(arrived[number])
            yield number
            left.append(self._leave(resting[number], back))
        for stream in self._streams:
            torch.cuda.current_stream().wait_stream(stream)  # then the buffers' memory may be used again

    def _follow(self, *streams: Any) -> None:
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())

    def _on(self, which: int) -> Any:
        return torch.cuda.stream(self._streams[which]) if self._streams else contextlib.nullcontext()

    def _fetch(self, states: Sequence[Resting], half: Tensor, before: Any) -> Any:
        """Copies of what rests, in a buffer that is free from event `before` on."""
        start = 0
        if before is not None:
            self._streams[0].wait_event(before)
        with self._on(0):
            for state in states:
                for name, home in state.home.items():
                    copy = half[start : start + _bytes(home)].view(home.dtype).view(home.shape)
                    state[name] = copy.copy_(home, non_blocking=True)
                    start += _room(home)
                    self.moved["to the device"] += _bytes(home)
                    self._here += _bytes(home)
        self.most = max(self.most, self._here)
        return self._streams[0].record_event() if self._streams else None

    def _leave(self, states: Sequence[Resting], back: bool) -> Any:
        self._follow(*self._streams[1:])
        with self._on(1):
            for state in states:
                for name, home in state.home.items():
                    if back:
                        for stream in self._streams[1:]:
                            state[name].record_stream(stream)  # a rule may have put a tensor of its own there
                        home.copy_(state[name], non_blocking=True)
                        self.moved["to the host"] += _bytes(home)
                    self._here -= _bytes(home)
                    state[name] = home
        return self._streams[1].record_event() if self._streams else None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _room(tensor: Tensor) -> int:
    """Bytes that it takes in a buffer."""
    return -(-_bytes(tensor) // _ALIGNED) * _ALIGNED
