"""The job itself: our model hooks, optimizer and monitoring put into Megatron-LM's pretrain()."""

from typing import Any


def train(args: Any) -> None:
    """Run Megatron-LM's pretrain() on validated flags."""
    import functools

    import megatron.training.training as training
    from megatron.core.enums import ModelType
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args

    from megatron_opt import platform
    from megatron_opt.training import batches

    if platform.on_cpu():
        training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    config = gpt_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, config)
    training.pretrain(
        container, batches.build_datasets, ModelType.encoder_or_decoder, batches.forward_step
    )
