"""Megatron-Core on CPU with gloo; with a GPU present this folder does nothing at all."""

import torch

CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "no_persist_layer_norm": True,
    "cross_entropy_loss_fusion": False,
}


def on_cpu() -> bool:
    """True where torch sees no CUDA device."""
    return not torch.cuda.is_available()


def activate() -> None:
    """Prepare this process: patches for CPU where there is no GPU, nothing otherwise. Call before importing Megatron."""
    if on_cpu():
        from megatron_opt.platform import cuda_answers, megatron_patches

        cuda_answers.install()
        megatron_patches.install()
