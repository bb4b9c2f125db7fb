"""Our own model of a checkpoint's or a configuration's flags, whole in one process, with the weights it is given."""

import contextlib
import io
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_opt.errors import UserError
from megatron_opt.layout.names import global_names

# what a job needs to be told and a model alone does not read
_JOB = (
    "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --optimizer adamw --mock-data "
    "--eval-iters 0 --hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer "
    # the same layers of torch's on every machine
    "--transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm "
    "--no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion"
).split()


def validated(argv: Sequence[str], vocabulary: int) -> Namespace:
    """A model's flags checked as a training job's are, by the same code; nothing of it stays behind."""
    from megatron_opt import platform

    platform.activate()
    import megatron.training.arguments as megatron_arguments
    from megatron.training import global_vars, training

    from megatron_opt.training import arguments

    global_vars.unset_global_variables()
    try:
        with (
            mock.patch.dict(os.environ, WORLD_SIZE="1", RANK="0", LOCAL_RANK="0"),  # the flags are of a model alone
            mock.patch.object(megatron_arguments, "parse_args", megatron_arguments.parse_args),  # restored after
            mock.patch.object(training, "get_model", training.get_model),
            contextlib.redirect_stdout(io.StringIO()),  # Megatron's words about its tokenizer
        ):
            args = arguments.parse([*_JOB, "--vocab-size", str(vocabulary), *argv])
            # GELU is Megatron's fused one (tanh) unless said, though jobs on CPU take the exact one
            args.bias_gelu_fusion = args.add_bias_linear and "--no-bias-gelu-fusion" not in argv
            return args
    finally:
        global_vars.unset_global_variables()


def of_checkpoint(saved: Namespace) -> Namespace:
    """Flags of one process that compute what a checkpoint's flags describe, in fp32 on this machine's layers."""
    from megatron_opt.checkpointing import compared

    length = int(getattr(saved, "seq_length", None) or saved.max_position_embeddings)
    model = ["--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1", "--seq-length", str(length)]
    positions = int(getattr(saved, "max_position_embeddings", None) or length)
    args = validated([*model, "--max-position-embeddings", str(max(positions, length))], saved.padded_vocab_size)
    for name in compared.FUNCTION:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))
    args.max_position_embeddings = positions
    return args


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Megatron's process groups of one rank, which really communicate (with itself)."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    if dist.is_initialized():
        raise UserError("this command is one process by itself; start it without torchrun.")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ps.initialize_model_parallel(1, 1, create_gloo_process_groups=False)
        yield
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()


def build(args: Namespace, weights: Callable[[str], Tensor]) -> torch.nn.Module:
    """The model with every parameter from `weights`, by canonical name; inside `one_process`."""
    from megatron.core import tensor_parallel

    from megatron_opt.distributed.meta_model import build_chunks

    one = Namespace(**vars(args))
    one.pipeline_model_parallel_size, one.virtual_pipeline_model_parallel_size = 1, None
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    (model,) = build_chunks(one, 0, device="cpu")
    with torch.no_grad():
        for name, parameter in global_names(model, 0):
            value = weights(name)
            if value.shape != parameter.shape:
                raise UserError(
                    f"{name} has the shape {tuple(value.shape)}, the flags give {tuple(parameter.shape)}; "
                    "the weights are of another model."
                )
            parameter.copy_(value)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor, start: int = 0, context: Any = None) -> Tensor:
    """(batch, sequence, padded vocabulary), fp32, of token ids (batch, sequence) at positions from `start` on."""
    positions = torch.arange(start, start + ids.shape[1])[None].expand_as(ids)
    return model(ids, positions, None, inference_context=context).float()
