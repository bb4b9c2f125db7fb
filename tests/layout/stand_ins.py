"""What a model on `meta` needs of packages for GPUs: Mamba's gated norm, and an attention that MLA's widths do not trouble."""

from typing import Any

import pytest
import torch


class GatedNorm(torch.nn.Module):
    """mamba_ssm's RMSNormGated: one weight, no bias."""

    def __init__(self, hidden: int, eps: float = 1e-5, dtype: Any = None, **ignored: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden, dtype=dtype))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    monkeypatch.setattr(mamba_mixer, "HAVE_MAMBA_SSM", True)
    monkeypatch.setattr(mamba_mixer, "HAVE_EINOPS", True)
    monkeypatch.setattr(mamba_mixer, "ExtendedRMSNorm", GatedNorm)
    make = DotProductAttention.__init__

    def without_widths(self: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **more: Any) -> None:
        make(self, *args, **more)

    monkeypatch.setattr(DotProductAttention, "__init__", without_widths)
