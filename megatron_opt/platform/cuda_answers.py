"""Answers of `torch.cuda` on a machine without one: streams that do nothing, factories that land on the CPU.

Only functions that take a `device` are wrapped, so the operations of a forward and backward pass cost what they cost.
"""

import functools
import resource
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float64: "torch.cuda.DoubleTensor",
}


class Stream:
    """A stream on which everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0
        self.stream_id = 0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event(Stream):
    """An event that has already been recorded."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _on_cpu(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _wrap_to(original: Any) -> Any:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _wrap_type(original: Any) -> Any:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:  # Megatron sorts parameters by the CUDA name of their type
            return _TYPE_NAMES.get(self.dtype) or original(self)
        return original(self, dtype, *args, **kwargs)

    return type_


def memory_stats() -> dict[str, int]:
    """This process's resident memory under the keys that Megatron prints, in bytes."""
    now = psutil.Process().memory_info().rss
    peak = max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    stats = {
        f"{kind}_bytes.all.{when}": value
        for kind in ("allocated", "reserved", "active")
        for when, value in (("current", now), ("peak", peak))
    }
    return stats | {"allocation.all.current": 0, "num_alloc_retries": 0}


def install() -> None:
    """Give `torch.cuda` its answers and send `device="cuda"` to the CPU, for this process."""
    if getattr(torch.cuda, "_answers_installed", False):
        return
    cuda: Any = torch.cuda
    cuda._answers_installed = True
    _device_constructors()  # kept: `with torch.device("meta")` must know the factories, not our wrappers
    total = psutil.virtual_memory().total
    properties = SimpleNamespace(
        name="CPU", total_memory=total, major=0, minor=0, multi_processor_count=1, gcnArchName=""
    )
    plain = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "set_stream": lambda stream: None,
        "stream": lambda stream=None: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_name": lambda device=None: "CPU",
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda device=None: (psutil.virtual_memory().available, total),
        "memory_stats": lambda device=None: memory_stats(),
        "memory_allocated": lambda device=None: memory_stats()["allocated_bytes.all.current"],
        "max_memory_allocated": lambda device=None: memory_stats()["allocated_bytes.all.peak"],
        "memory_reserved": lambda device=None: memory_stats()["allocated_bytes.all.current"],
        "max_memory_reserved": lambda device=None: memory_stats()["allocated_bytes.all.peak"],
        "reset_peak_memory_stats": lambda device=None: None,
    }
    for name, answer in plain.items():
        setattr(cuda, name, answer)
    cuda.nvtx.range_push = lambda message: 0
    cuda.nvtx.range_pop = lambda: 0
    cuda.nvtx.range = contextmanager(lambda *args, **kwargs: iter((None,)))
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.to = _wrap_to(tensor.to)
    tensor.type = _wrap_type(tensor.type)
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    tensor.pin_memory = lambda self, *args, **kwargs: self
    # Megatron compiles small functions at import; on a few cores every rank would compile longer than it saves.
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda function: function)  # type: ignore
    module: Any = torch.nn.Module
    module.to = _wrap_to(module.to)
    module.cuda = lambda self, *args, **kwargs: self
