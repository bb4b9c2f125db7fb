"""Philox4x32-10 in torch: the random bits of csrc/include/philox.h, for the reference of rounding."""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _product(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of constant·x for 32-bit values held in int64, without overflowing int64."""
    low = constant * (x & 0xFFFF)  # < 2^48
    high = constant * (x >> 16) + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def draws(seed: int, step: int, slot: int, first: int, count: int, device: torch.device) -> Tensor:
    """32 random bits, int64 (count,), for elements first … first+count−1 of a tensor slot at a step."""
    groups = torch.arange(first // 4, (first + count + 3) // 4, device=device)
    c0, c1 = groups & _LOW, groups >> 32
    c2, c3 = torch.full_like(groups, step & _LOW), torch.full_like(groups, slot)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack((c0, c1, c2, c3), 1).view(-1)[first % 4 : first % 4 + count]
