"""Megatron-Core on CPU with gloo; where there is a GPU, the layers of `--transformer-impl local` are replaced and faults mended."""

import importlib.util
import os
import sys

import torch


def on_cpu() -> bool:
    """True where torch sees no CUDA device."""
    return not torch.cuda.is_available()


def activate(transformer_engine: bool = False) -> None:
    """Patch this process, once; to be called before Megatron is imported. On CPU Transformer Engine is there only when asked for."""
    if on_cpu():
        from megatron_opt.platform import cuda_answers
        from megatron_opt.platform import transformer_engine as te

        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it under tensor parallelism
        cuda_answers.install()
        if transformer_engine:
            te.install()
        else:
            te.hide()
    for replacement in replacements():
        replacement.install()
    from megatron_opt.platform import megatron_faults

    megatron_faults.install()


def replacements() -> tuple:
    """What is replaced in Megatron on this machine."""
    from megatron_opt.platform import latent_attention, local_layers, megatron_patches, single_rank

    everywhere = (*local_layers.REPLACEMENTS, latent_attention.CHANNELS)  # the last after the forward that it needs
    return everywhere + ((*megatron_patches.REPLACEMENTS, single_rank.ALL_REDUCE) if on_cpu() else ())


def can_fp8() -> bool:
    """Whether Transformer Engine, whose layers alone compute in FP8 and FP4, is there; on CPU only where it was asked for."""
    if on_cpu():
        return "transformer_engine" in sys.modules
    return importlib.util.find_spec("transformer_engine") is not None
