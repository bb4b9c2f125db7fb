"""Megatron-Core on CPU with gloo; with a GPU present this folder only mends faults of Megatron (megatron_faults.py)."""

import importlib.util
import os

import torch


def on_cpu() -> bool:
    """True where torch sees no CUDA device."""
    return not torch.cuda.is_available()


def activate() -> None:
    """Patch this process where there is no GPU, mend Megatron's faults anywhere; to be called before Megatron is imported."""
    if on_cpu():
        from megatron_opt.platform import cuda_answers, latent_attention, megatron_patches

        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it under tensor parallelism
        cuda_answers.install()
        megatron_patches.install()
        latent_attention.install()
    from megatron_opt.platform import megatron_faults

    megatron_faults.install()


def can_fp8() -> bool:
    """Whether Transformer Engine, whose layers alone compute in FP8 and FP4, is installed here."""
    return importlib.util.find_spec("transformer_engine") is not None
