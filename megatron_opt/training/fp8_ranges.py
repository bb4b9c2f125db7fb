"""What tensors lose in FP8, by kind of layer: their largest numbers, underflows and overflows in the steps that are logged.

Underflows are elements other than zero that become zero; overflows those beyond the format's largest number under their scale, which
are clipped; both as shares of all elements, in the copy by rows. Tensors and both words are named as in Transformer Engine's own
LogFp8TensorStats. Counted where its Python asks its C++ module to quantize, so that recipes and layouts count alike, emulated or not.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opt.distributed.post_steps import Report
from megatron_opt.kernels.host import current_device

KINDS = ("qkv", "proj", "fc1", "fc2", "experts_fc1", "experts_fc2", "other")
TENSORS = ("activation", "weight", "gradient")
KEY = "fp8_ranges"
_TOP = {7: 0x7E, 8: 0x7B}  # code of the largest number by DType: 448 of E4M3, 57,344 of E5M2
_ABOVE = 1 + 2.0**-12  # a scale's own rounding clips nothing


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The flag that asks for them."""
    group.add_argument(
        "--log-fp8-ranges",
        action="store_true",
        help="log amax, underflows and overflows in FP8 by kind of layer",
    )


def kind_of(module: str) -> str:
    """The kind of the layer of this name."""
    leaf = module.rsplit(".", 1)[-1]
    if leaf in ("linear_fc1", "linear_fc2"):
        return f"{'experts_' if '.experts.' in module else ''}{leaf.removeprefix('linear_')}"
    if leaf in ("linear_qkv", "linear_proj"):
        return leaf.removeprefix("linear_")
    return "qkv" if leaf.startswith(("linear_q_", "linear_kv_", "linear_qkv_")) else "other"


def losses(x: Tensor, quantized: Any) -> tuple[Tensor, Tensor] | None:
    """(underflows, overflows) of x in its FP8 copy by rows; None where there is no such copy."""
    data = quantized._rowwise_data if hasattr(quantized, "_rowwise_data") else quantized._data
    if data is None:
        return None
    codes = data.reshape(-1).view(torch.uint8) & 0x7F
    flat, top = x.reshape(-1), codes == _TOP[int(quantized._fp8_dtype)]
    kept = _numbers(quantized).reshape(-1).abs() * _ABOVE
    return ((codes == 0) & (flat != 0)).sum(), (top & (flat.abs() > kept)).sum()


def _numbers(quantized: Any) -> Tensor:
    """What an FP8 tensor stands for, fp32."""
    if hasattr(quantized, "_is_2D_scaled"):  # computed in Python
        return quantized.dequantize(dtype=torch.float32)  # type: ignore[no-any-return]
    import transformer_engine_torch as tex

    return tex.dequantize(quantized, tex.DType.kFloat32)  # type: ignore[no-any-return]


class Ranges:
    """Counts of one run; `install` puts them around Transformer Engine's quantizing functions, where `counting` says when."""

    def __init__(self) -> None:
        self.counting = False
        self._chunks: Sequence[Any] = ()
        self._known: dict[int, tuple[Any, tuple[int, int] | None]] = {}  # held, so that no other gets its id

    def _forget(self) -> None:
        device = current_device()
        shape = (len(KINDS), len(TENSORS))
        self._counts = torch.zeros(*shape, 3, dtype=torch.float64, device=device)  # elements, underflows, overflows
        self._amax = torch.zeros(shape, dtype=torch.float64, device=device)

    def install(self, chunks: Sequence[Any]) -> None:
        """Count in these model chunks' layers, whose rank has its device by now."""
        import transformer_engine_torch as tex
        from transformer_engine.pytorch import cpp_extensions  # has taken the same names

        self._chunks = chunks
        self._forget()
        for name, make in (
            ("quantize", self._plain),
            ("bgrad_quantize", self._with_bias),
            ("split_quantize", self._split),
            ("rmsnorm_fwd", functools.partial(self._normed, at=4)),  # x, weight, ε, out, quantizer, …
            ("layernorm_fwd", functools.partial(self._normed, at=5)),
        ):
            counted = make(getattr(tex, name))
            setattr(tex, name, counted)
            setattr(cpp_extensions, name, counted)

    def _plain(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def quantize(x: Tensor, quantizer: Any, *rest: Any, **more: Any) -> Any:
            found = original(x, quantizer, *rest, **more)
            self._take(x, quantizer, found)
            return found

        return quantize

    def _with_bias(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def bgrad_quantize(gradient: Tensor, quantizer: Any) -> Any:
            found = original(gradient, quantizer)
            self._take(gradient, quantizer, found[1])
            return found

        return bgrad_quantize

    def _split(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def split_quantize(x: Tensor, sizes: Any, quantizers: Any, *rest: Any, **more: Any) -> Any:
            found = original(x, sizes, quantizers, *rest, **more)
            for part, quantizer, one in zip(x.split(list(sizes)), quantizers, found, strict=True):
                self._take(part, quantizer, one)
            return found

        return split_quantize

    def _normed(self, original: Callable[..., Any], at: int) -> Callable[..., Any]:
        """A norm that quantizes what it gives: done once more without, in a step that is counted."""

        def norm(*given: Any) -> Any:
            found = original(*given)
            if self.counting and given[at] is not None:
                self._take(original(*given[: at - 1], None, None, *given[at + 1 :])[0], given[at], found[0])
            return found

        return norm

    def _place(self, quantizer: Any) -> tuple[int, int] | None:
        """(kind, tensor) of a layer's quantizer."""
        if id(quantizer) not in self._known:
            for chunk in self._chunks:
                for name, module in chunk.named_modules():
                    found = getattr(module, "quantizers", None)
                    if isinstance(found, dict):
                        self._know(kind_of(name), found, getattr(module, "_fp8_workspaces", {}).values())
            self._known.setdefault(id(quantizer), (quantizer, None))
        return self._known[id(quantizer)][1]

    def _know(self, kind: str, quantizers: dict[str, Any], weights: Iterable[Any]) -> None:
        """Per product input, weight and output forward, gradient of the output and of the input backward.

        Quantized weights that are kept over microbatches have quantizers of their own.
        """
        row = KINDS.index(kind)
        for i, one in enumerate(quantizers.get("scaling_fwd") or ()):
            self._known[id(one)] = (one, (row, i % 3) if i % 3 < 2 else None)
        for i, one in enumerate(quantizers.get("scaling_bwd") or ()):
            self._known[id(one)] = (one, (row, 2) if i % 2 == 0 else None)
        for weight in weights:
            if (one := getattr(weight, "_quantizer", None)) is not None:
                self._known[id(one)] = (one, (row, 1))

    def _take(self, x: Tensor, quantizer: Any, quantized: Any) -> None:
        if not self.counting or not x.numel() or (place := self._place(quantizer)) is None:
            return
        x = x.detach()
        if (lost := losses(x, quantized)) is None:
            return
        self._counts[place] += torch.stack([torch.full_like(lost[0], x.numel()), *lost])
        self._amax[place] = torch.maximum(self._amax[place], x.abs().max().double())

    def report(self) -> Report | None:
        """What all ranks have counted since the last report, and forget it; None where nothing was."""
        counts, amax = self._counts, self._amax
        self._forget()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(amax, op=dist.ReduceOp.MAX)
        entry: dict[str, dict[str, dict[str, float]]] = {}
        series: dict[str, float] = {}
        for row, by_tensor in zip(KINDS, torch.cat([counts, amax[..., None]], -1).tolist(), strict=True):
            for tensor, (elements, under, over, largest) in zip(TENSORS, by_tensor, strict=True):
                if elements:
                    found = {"amax": largest, "underflows": under / elements, "overflows": over / elements}
                    entry.setdefault(row, {})[tensor] = found
                    series |= {f"fp8-{name}/{row}-{tensor}": value for name, value in found.items()}
        if not entry:
            return None
        parts = []
        for name in ("underflows", "overflows"):
            worst = max((one[name], f"{tensor} of {row}") for row, of in entry.items() for tensor, one in of.items())
            parts.append(f"{name} up to {worst[0]:.2%}" + (f" ({worst[1]})" if worst[0] else ""))
        return Report(KEY, f" fp8: {', '.join(parts)}", entry, series)
