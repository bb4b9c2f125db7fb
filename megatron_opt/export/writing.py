"""A checkpoint of ours from weights alone: a model to start from, on any layout, without optimizer state."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opt.checkpointing import compared, folders
from megatron_opt.errors import UserError
from megatron_opt.export import model as models


def write(args: Namespace, weights: Callable[[str], Tensor], save: Path) -> Path:
    """Write SAVE/iter_0000000, whose flags are those of the function alone: no run is continued from it."""
    from megatron.core import dist_checkpointing, mpu

    if folders.iterations(save) or (save / folders.TRACKER).exists():
        raise UserError(f"--output {save} holds checkpoints already; give another folder.")
    staging = save / folders.STAGING / folders.name_of(0)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    # the vocabulary is the embedding's; that of a tokenizer, which a run brings, is no part of the function
    known = {name: getattr(args, name) for name in compared.FUNCTION if hasattr(args, name) and name != "vocab_size"}
    known |= {"max_position_embeddings": args.max_position_embeddings, "bf16": args.bf16, "fp16": args.fp16}
    known |= {"no_save_optim": True, "no_save_rng": True, "params_dtype": args.params_dtype}
    with models.one_process():
        model: Any = models.build(args, weights)
        content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
        metadata = content | {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        state = {
            "args": Namespace(**known),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "model": model.to(args.params_dtype).sharded_state_dict(metadata=metadata),
        }
        dist_checkpointing.save(state, str(staging), content_metadata=content, async_strategy=args.async_strategy)
    folders.publish(save, 0)
    shutil.rmtree(save / folders.STAGING, ignore_errors=True)
    return save / folders.name_of(0)


def dtype_of(name: str) -> torch.dtype:
    """A type that a model trains in, by Hugging Face's name; UserError for another."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UserError(f"the weights are {name}; a model of {' or '.join(known)} can be imported.")
    return known[name]
