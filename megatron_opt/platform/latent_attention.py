"""Multi-latent attention on local layers: Megatron-Core's local attention does not take MLA's head sizes, ours needs none."""

from typing import Any

from megatron_opt.platform.replacement import Replacement


def _init(self: Any, *args: Any, k_channels: Any = None, v_channels: Any = None, **kwargs: Any) -> None:
    # the scaled-dot-product forward in place of Megatron's reads head sizes from its inputs; MLA gives the scale
    if k_channels is not None and kwargs.get("softmax_scale") is None:
        raise AssertionError("MLA gives no softmax scale, and the local attention would take that of plain heads")
    CHANNELS.original()(self, *args, **kwargs)


CHANNELS = Replacement(
    "megatron.core.transformer.dot_product_attention:DotProductAttention", "__init__", _init, honours=None
)
