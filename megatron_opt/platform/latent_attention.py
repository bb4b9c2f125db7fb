"""Multi-latent attention on local layers: Megatron-Core's local attention does not take MLA's head sizes, ours needs none."""

from typing import Any

from torch import nn


def _with_channels(original: Any) -> Any:
    def __init__(self: nn.Module, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any) -> None:
        # the scaled-dot-product forward in place of Megatron's reads head sizes from its inputs; MLA gives the scale
        if k_channels is not None and kwargs.get("softmax_scale") is None:
            raise AssertionError("MLA gives no softmax scale, and the local attention would take that of plain heads")
        original(self, *args, **kwargs)

    return __init__


def install() -> None:
    """Let `DotProductAttention` be built by MLA, once; after `local_layers`, whose forward it needs."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    if not getattr(DotProductAttention, "takes_channels", False):
        DotProductAttention.__init__ = _with_channels(DotProductAttention.__init__)
        DotProductAttention.takes_channels = True
