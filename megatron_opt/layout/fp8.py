"""Weights of FP8 products: which they are, and their bytes as Transformer Engine lays out numbers, copies by column and scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

BLOCKS = ("blockwise", "mxfp8")  # recipes whose columns are quantized apart from rows


@dataclass(frozen=True)
class Fp8:
    """How a run quantizes; `gathered`: weights stay in FP8; `first` and `last`: layers at either end kept in bf16."""

    recipe: str = "delayed"
    gathered: bool = False
    first: int = 0
    last: int = 0

    @staticmethod
    def of(flags: Mapping[str, Any]) -> "Fp8 | None":
        """From Megatron's flags, hyphens in names; None where products are in bf16."""
        if not flags.get("fp8-format"):
            return None
        ends = [int(flags.get(f"num-layers-at-{end}-in-bf16", 1)) for end in ("start", "end")]
        first, last = ends if flags.get("first-last-layers-bf16") else (0, 0)
        return Fp8(str(flags.get("fp8-recipe") or "delayed"), bool(flags.get("fp8-param-gather")), first, last)

    def quantizes(self, layer: int, layers: int) -> bool:
        """Whether a layer's products are in FP8; layers of multi-token prediction, numbered `layers`, always are."""
        return self.first <= layer < layers - self.last or layer >= layers

    def covers(self, kind: str, shape: Sequence[int], layer: int, layers: int) -> bool:
        """Whether a parameter is the weight of an FP8 product: not those of embeddings, routers and the output layer."""
        return kind == "hidden" and len(shape) == 2 and self.quantizes(layer, layers)

    def copies(self, transposes: bool) -> int:
        """Bytes of a weight's element: one by row, and one by column where products of the backward pass want it.

        `transposes`: products take their operands in one order only (Hopper), so that weights with one scale are transposed.
        """
        return 2 if transposes or self.recipe in BLOCKS else 1

    def scale_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a weight's scales: one fp32; one a 128×128 block, by row and column; one byte a run of 32, both ways.

        Padded as products read them: to 4 blocks (float8_blockwise_tensor.py), to 128×4 runs (mxfp8_tensor.py).
        """
        rows, columns = prod(shape[:-1]), shape[-1]
        if self.recipe == "mxfp8":
            return _up(rows, 128) * _up(columns // 32, 4) + _up(rows // 32, 4) * _up(columns, 128)
        if self.recipe == "blockwise":
            tall, wide = -(-rows // 128), -(-columns // 128)
            return 4 * (tall * _up(wide, 4) + wide * _up(tall, 4))
        return 4

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a weight's element that data-parallel ranks gather: MXFP8's travel in bf16, as rows and columns differ."""
        return 1 if self.gathered and self.recipe != "mxfp8" else 2

    def product_time(self, transposes: bool) -> float:
        """Time of a product over that of one whose tensors have one scale each: block scales are read and applied inside.

        Transformer Engine's own measurement of a layer's products (docs/examples/gemm_profiling, hidden 4096, 15,872 tokens): MXFP8
        7.161 ms against 6.812 on B300. Blockwise on H200 was timed with its casts alone, 22.882 ms; tensorwise casts took 20.285 −
        16.785 ms there for 10 bytes an element (each product casts its own operands, one way), blockwise ones move 6.06:
        (22.882 − 2.12) / 16.785. Blackwell computes blocks as MXFP8.
        """
        return {"mxfp8": 1.05, "blockwise": 1.24 if transposes else 1.05}.get(self.recipe, 1.0)

    def cast_bytes(self, transposes: bool) -> float:
        """Memory traffic of quantizing one bf16 element: read, for `tensorwise` once more before; numbers and scales written."""
        scales = {"blockwise": 2 * 4 / 128, "mxfp8": 3 * 2 / 32}.get(self.recipe, 0.0)  # MX scales are laid out anew
        return (4.0 if self.recipe == "tensorwise" else 2.0) + self.copies(transposes) + scales


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
