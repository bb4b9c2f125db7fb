"""8-bit state in checkpoints: the values that the codes of one shard stand for, and the codes again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opt.kernels import quantize

_SCALE = "_absmax"


@dataclass
class Codes:
    """Codes of one shard and the absolute maxima of their blocks."""

    codes: Tensor
    absmax: Tensor

    def decode(self) -> Tensor:
        """fp32 values; a block's largest is its absolute maximum exactly, so that encoding them finds the same codes."""
        if self.codes.dtype == torch.uint8:
            return quantize.decode_unsigned(self.codes, self.absmax)
        scales = self.absmax.double().repeat_interleave(quantize.BLOCK)[: self.codes.numel()]
        return (self.codes.double().view(-1) * scales / 127.0).float()

    def encode(self, values: Tensor) -> None:
        """Replace the codes and maxima by those of the values."""
        absmax = quantize.block_absmax(values)
        self.absmax.copy_(absmax)
        if self.codes.dtype == torch.uint8:
            nearest = torch.full((values.numel(),), 1 << 31, dtype=torch.int64, device=values.device)
            self.codes.view(-1).copy_(quantize.encode_unsigned(values, absmax, nearest))
        else:
            self.codes.view(-1).copy_(quantize.encode_signed(values, absmax))


def find(state: dict[str, Tensor], key: str) -> Codes | None:
    """The codes of a state key where it is 8-bit."""
    absmax = state.get(key + _SCALE)
    return None if absmax is None else Codes(state[key], absmax)


def is_scale(state: dict[str, Tensor], key: str) -> bool:
    """Whether a key holds the maxima of another."""
    return key.endswith(_SCALE) and key.removesuffix(_SCALE) in state
