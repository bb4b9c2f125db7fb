"""Megatron-Core on CPU with gloo; with a GPU present this folder does nothing at all."""

import os

import torch


def on_cpu() -> bool:
    """True where torch sees no CUDA device."""
    return not torch.cuda.is_available()


def activate() -> None:
    """Patch this process where there is no GPU, do nothing otherwise; to be called before Megatron is imported."""
    if on_cpu():
        from megatron_opt.platform import cuda_answers, megatron_patches

        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it under tensor parallelism
        cuda_answers.install()
        megatron_patches.install()
