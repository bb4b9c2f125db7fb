"""A GPU that is not there: tensors that say `cuda:0`, computed on the CPU or not at all, while what a GPU would do is counted.

A step runs on them as it would on a GPU, by the same branches: an operation that mixes them with tensors on the CPU fails, a
read of a value or a copy from or to the host is a wait, anything else that is no view or empty tensor is a launch. On
`meta` nothing is computed or allocated (a model of any size), and every value read is 1.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
_CAPABILITY = (9, 0)
_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "ones",
    "rand",
    "randn",
    "randint",
    "randperm",
    "tensor",
    "zeros",
)
_TENSORS_A_LAUNCH = 48  # of torch's multi-tensor kernels, two lists of pointers
_CONCATENATED = 128  # tensors a launch of `cat`
_PIECES = 253  # tensors a launch of our multi-tensor kernels, csrc/include/grid.h
# Operations that look at values on the host, or check a decomposition's success there; torch's CUDA sources.
_READS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::allclose",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::_linalg_check_errors", "aten::bincount",
}  # fmt: skip
_FREE = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::resize_", "aten::is_same_size", "aten::_unsafe_view",
}  # fmt: skip


@dataclass
class Count:
    """Waits of the host, launches by operation, and the bytes that launches read and write."""

    waits: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    bytes: float = 0.0

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU; what it holds is on the CPU or `meta`."""

    inner: torch.Tensor  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=GPU
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{function} on a pretended GPU's tensor outside `pretended_gpu`")

    def data_ptr(self) -> int:
        inner = self.inner
        if inner.device.type == "meta":
            return inner.untyped_storage()._cdata + inner.storage_offset() * inner.element_size()
        return inner.data_ptr()

    def tolist(self) -> Any:  # type: ignore[override]
        return self.to("cpu").tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, **rest: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=GPU)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner!r})"


def gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's own memory as the GPU's."""
    return tensor if isinstance(tensor, OnGpu) else OnGpu(tensor.detach())


def cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The memory behind a tensor of the GPU, without a wait."""
    return tensor.inner if isinstance(tensor, OnGpu) else tensor


class _Mode(TorchDispatchMode):
    def __init__(self, count: Count, meta: bool) -> None:
        super().__init__()
        self.count, self.meta = count, meta

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        ours = [x for x in given if isinstance(x, OnGpu)]
        name = function._schema.name + (f".{function._schema.overload_name}" if function._schema.overload_name else "")
        if not ours and not _on_gpu(kwargs.get("device")):
            return function(*args, **kwargs)
        copied = self._copied(function._schema.name, name, args, kwargs, given)
        if copied is not None:
            return copied
        kwargs = dict(kwargs)
        if "device" in kwargs:
            kwargs["device"] = self._home
        self._check(name, given)
        wrappers = {id(x.inner): x for x in ours}
        if self._reads(function._schema.name, name, args):
            self.count.waits[name] += 1
            if self.meta and function._schema.name == "aten::_local_scalar_dense":
                return torch.ones((), dtype=args[0].dtype).item()
        if self.meta and function._schema.name == "aten::geqrf":  # torch has no meta kernel of it
            function = _geqrf_shapes
        unwrap = lambda x: x.inner if isinstance(x, OnGpu) else x.to(self._home) if _lone(x) else x  # noqa: E731
        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
        if function is _geqrf_shapes or not _is_view(function):
            self._launch(name, args, given, result)

        def wrapped(x: Any) -> Any:
            return x if not isinstance(x, torch.Tensor) else wrappers[id(x)] if id(x) in wrappers else OnGpu(x)

        return tree_map(wrapped, result)

    @property
    def _home(self) -> torch.device:
        return torch.device("meta" if self.meta else "cpu")

    def _check(self, name: str, given: list[torch.Tensor]) -> None:
        for x in given:
            if not isinstance(x, OnGpu) and x.device.type == "cpu" and x.ndim:
                if name.startswith(("aten::index", "aten::_index_put")):  # torch brings indices over, and waits
                    self.count.waits[f"{name} by an index on the CPU"] += 1
                else:
                    raise RuntimeError(f"{name} mixes tensors of the GPU with one on the CPU, {tuple(x.shape)}")

    def _reads(self, base: str, name: str, args: Any) -> bool:
        if base in _READS or name in _READS:
            return True
        if base in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"):
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return False

    def _copied(self, base: str, name: str, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        """The result of a copy between host and GPU, or None where this is none."""
        if base == "aten::_to_copy" and kwargs.get("device") is not None:
            from_gpu, to_gpu = isinstance(args[0], OnGpu), _on_gpu(kwargs["device"])
            if from_gpu == to_gpu:
                return None
            self._moved(name, args[0], to_gpu, kwargs.get("non_blocking", False))
            dtype = kwargs.get("dtype") or args[0].dtype
            if to_gpu:
                return OnGpu(args[0].to(self._home, dtype, copy=True))
            return torch.ones(args[0].shape, dtype=dtype) if self.meta else args[0].inner.to(dtype, copy=True)
        if base == "aten::copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
            to, source = args[:2]
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            self._moved(name, source, isinstance(to, OnGpu), not blocking)
            if not self.meta:
                cpu(to).copy_(cpu(source))
            elif not isinstance(to, OnGpu):
                to.fill_(1)
            return to
        return None

    def _moved(self, name: str, source: torch.Tensor, to_gpu: bool, non_blocking: bool) -> None:
        self.count.launches["copy to the GPU" if to_gpu else "copy to the host"] += 1
        self.count.bytes += source.numel() * source.element_size()
        if not non_blocking:
            self.count.waits["copy to the GPU" if to_gpu else "copy to the host"] += 1

    def _launch(self, name: str, args: Any, given: list[torch.Tensor], result: Any) -> None:
        name = name.split(".")[0]
        if name in _FREE:
            return
        made = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        if not any(x.numel() for x in (*given, *made)):
            return
        number = 1
        if name == "aten::_foreach_copy_" and any(a.stride() != b.stride() for a, b in zip(*args[:2])):
            number = len(args[0])  # torch takes them one by one
        elif name.startswith("aten::_foreach"):
            number = math.ceil(len(args[0]) / _TENSORS_A_LAUNCH)
        elif name == "aten::cat":
            number = math.ceil(len(args[0]) / _CONCATENATED)
        elif name in ("megatron_opt::multi_tensor_update", "megatron_opt::multi_tensor_sum"):
            number = math.ceil(len(args[2]) / _PIECES)
        self.count.launches[name] += number
        ids = {id(cpu(x)) for x in given}
        self.count.bytes += sum(x.numel() * x.element_size() for x in given)
        self.count.bytes += sum(x.numel() * x.element_size() for x in made if id(x) not in ids)


class _Generator:
    """A generator of any device: the CPU's."""

    def __new__(cls, device: Any = None, made: Any = torch.Generator) -> Any:  # type: ignore[misc]
        return made()


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _lone(x: Any) -> bool:
    """A number in a tensor of no dimension: torch hands it over as an argument."""
    return isinstance(x, torch.Tensor) and not x.ndim


def _geqrf_shapes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-2], min(x.shape[-2:])))


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _unwrapped(function: Any) -> Any:
    """A function of torch's beneath what the platform layer has made of it."""
    return getattr(function, "__wrapped__", function)


@contextmanager
def pretended_gpu(meta: bool = False) -> Iterator[Count]:
    """`device="cuda"` is a GPU that counts, and the current one; on `meta` nothing is computed."""
    torch._C._ensureCUDADeviceGuardSet()  # without a driver, guards of the device do nothing
    count, home = Count(), torch.device("meta" if meta else "cpu")
    tensor: Any = torch.Tensor
    kept = [(torch, name, getattr(torch, name)) for name in _FACTORIES]
    kept += [(tensor, name, getattr(tensor, name)) for name in ("to", "cuda")]
    kept += [(torch.cuda, "current_device", torch.cuda.current_device), (torch, "Generator", torch.Generator)]
    kept += [(torch.cuda, "get_device_capability", torch.cuda.get_device_capability)]
    to = _unwrapped(tensor.to)

    def made(name: str, factory: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            if not _on_gpu(kwargs.get("device")):
                return factory(*args, **kwargs)
            if name == "as_tensor":
                return (
                    torch.tensor(args[0], **kwargs) if not isinstance(args[0], torch.Tensor) else args[0].to(**kwargs)
                )
            if name == "tensor":  # its numbers come from the host
                count.waits["copy to the GPU"] += 1
            count.launches[name] += name != "empty"
            generator = kwargs.pop("generator", None)
            more = {"generator": generator} if generator is not None and not meta else {}
            result = OnGpu(factory(*args, **{**kwargs, "device": home}, **more))
            count.bytes += result.numel() * result.element_size() if name != "empty" else 0
            return result

        return make

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`Tensor.to` by its parts: torch's own would start CUDA."""
        words = [*args, *kwargs.values()]
        like = [x for x in words if isinstance(x, torch.Tensor)]
        device = next(
            (
                x
                for x in (kwargs.get("device"), *args)
                if isinstance(x, str | torch.device | int) and not isinstance(x, bool)
            ),
            None,
        )
        device = like[0].device if like else device
        if not isinstance(self, OnGpu) and not _on_gpu(device):
            return to(self, *args, **kwargs)
        dtype = like[0].dtype if like else next((x for x in words if isinstance(x, torch.dtype)), self.dtype)
        same = device is None or _on_gpu(device) == isinstance(self, OnGpu)
        if same and dtype == self.dtype and not kwargs.get("copy"):
            return self
        more = {} if same else {"device": torch.device(device)}  # type: ignore[arg-type]
        return torch.ops.aten._to_copy.default(
            self, dtype=dtype, non_blocking=kwargs.get("non_blocking", False), **more
        )

    mode = _Mode(count, meta)
    try:
        for _, name, function in kept[: len(_FACTORIES)]:
            setattr(torch, name, made(name, _unwrapped(function)))
        for where, name, answer in (
            (tensor, "to", moved),
            (tensor, "cuda", lambda self, *args, **kwargs: self.to(GPU)),
            (torch.cuda, "current_device", lambda: GPU),
            (torch.cuda, "get_device_capability", lambda device=None: _CAPABILITY),
            (torch, "Generator", _Generator),
        ):
            setattr(where, name, answer)
        with mode:
            yield count
    finally:
        for where, name, function in kept:
            setattr(where, name, function)
