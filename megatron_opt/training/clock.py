"""Seconds spent in parts of a step: by CUDA events on a GPU, so that nothing waits, by the wall clock elsewhere."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Sums of spans by name since the last `take`."""

    def __init__(self) -> None:
        self.running = True  # False: nothing is counted, as during evaluation
        self._sums: dict[str, float] = {}
        self._events: list[tuple[str, Any, Any]] = []
        self._cuda = torch.cuda.is_available()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to `name`."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            if self._cuda:
                start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                try:
                    return function(*args, **kwargs)
                finally:
                    stop.record()
                    self._events.append((name, start, stop))
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._sums[name] = self._sums.get(name, 0.0) + time.perf_counter() - began

        return wrapped

    def take(self) -> dict[str, float]:
        """Seconds by name, and start again from zero."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, stop in self._events:
                self._sums[name] = self._sums.get(name, 0.0) + start.elapsed_time(stop) * 1e-3
            self._events.clear()
        sums, self._sums = self._sums, {}
        return sums
