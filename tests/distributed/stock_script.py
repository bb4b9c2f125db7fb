"""Megatron-LM's pretrain_gpt.py in structure, with nothing of this project but its first import (and, for data, its readers)."""

import megatron_opt.plugin  # noqa: F401, I001

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_opt.training.batches import build_datasets, forward_step


def main() -> None:
    """Parse Megatron's flags and train."""
    args = parse_and_validate_args()
    config = gpt_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, config)
    pretrain(container, build_datasets, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
