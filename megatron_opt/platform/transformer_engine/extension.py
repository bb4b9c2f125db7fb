"""The module `transformer_engine_torch`: enumerations as Transformer Engine numbers them, and the operations given to it."""

import enum
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from megatron_opt.errors import UserError


class DType(enum.IntEnum):
    """Number formats (transformer_engine/common: NVTEDType)."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def torch_dtype(number: Any, default: torch.dtype) -> torch.dtype:
    """The torch type of a number format, of a torch type itself, or `default` for None."""
    if number is None or isinstance(number, torch.dtype):
        return number or default
    return TORCH[int(number)]


_NUMBERS: dict[str, int] = {}


class _Absent:
    """A name of the C++ module that is not answered for: to be named in annotations, not to be called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            f"Transformer Engine's {self._name} needs a GPU; leave out the flag that asks for it, "
            "or train with --transformer-impl local."
        )

    def __int__(self) -> int:  # members of enumerations, tabulated at import
        return _NUMBERS.setdefault(self._name, len(_NUMBERS))

    __index__ = __int__

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Absent) and other._name == self._name


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name)


def _numbered(name: str, numbers: dict[str, int]) -> Any:
    return enum.IntEnum(name, numbers)  # type: ignore[misc]


_FORWARD = [f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
_BACKWARD = [f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("OUTPUT", "INPUT")]
_BACKENDS = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
MODULE: Any = _Module("transformer_engine_torch")
MODULE.DType = DType
MODULE.NVTE_Fused_Attn_Backend = _numbered("NVTE_Fused_Attn_Backend", _BACKENDS)
MODULE.FP8FwdTensors = _numbered("FP8FwdTensors", {name: i for i, name in enumerate(_FORWARD)})
MODULE.FP8BwdTensors = _numbered("FP8BwdTensors", {name: i for i, name in enumerate(_BACKWARD)})
MODULE.get_cublasLt_version = lambda: 130200
MODULE.get_num_cublas_streams = lambda: 1


def operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give `function` to the module under its own name."""
    setattr(MODULE, function.__name__, function)
    return function
