"""Megatron's own model on the `meta` device, stage by stage: every parameter of a job that has not started."""

import contextlib
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from megatron_opt import quiet
from megatron_opt.errors import UserError
from megatron_opt.layout.kinds import find_kind
from megatron_opt.layout.names import global_names
from megatron_opt.layout.parameter import Parameter
from megatron_opt.platform.hybrid_stack import local_stack


@contextlib.contextmanager
def pretended_world(
    rank: int, world: int, *, tp: int = 1, pp: int = 1, virtual: int | None = None, ep: int = 1, etp: int | None = None
) -> Iterator[None]:
    """Megatron's process groups as this rank of such a world has them, over a backend that sends nothing."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise UserError("a model can be laid out for other ranks only outside a running job.")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        ps.initialize_model_parallel(
            tp, pp, virtual, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp or tp,
            create_gloo_process_groups=False,
        )  # fmt: skip
        yield
    finally:
        ps.destroy_model_parallel()
        dist.destroy_process_group()


def model_config(args: Any) -> Any:
    """Megatron's configuration of the model that flags describe: a hybrid one where they give a pattern, else a GPT."""
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    if getattr(args, "hybrid_layer_pattern", None) is None:
        return gpt_config_from_args(args)
    config = hybrid_config_from_args(args)
    if config.transformer.transformer_impl == "local" and config.hybrid_stack_spec is None:
        config.hybrid_stack_spec = local_stack(config.transformer)
    return config


def build_chunks(
    args: Any, stage: int, *, tp: int = 1, ep: int = 1, etp: int = 1, device: str = "meta"
) -> list[torch.nn.Module]:
    """Model chunks of a pipeline stage on `device`, in the current (pretended) world of these sizes."""
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    sizes = Namespace(**vars(args))
    sizes.tensor_model_parallel_size, sizes.expert_model_parallel_size = tp, ep
    sizes.expert_tensor_parallel_size, sizes.context_parallel_size = etp, 1
    sizes.tensor_parallel_num_weight_shards, sizes.expert_tensor_parallel_num_weight_shards = tp, etp
    sizes.gtp_weight_remat_size = sizes.expert_gtp_weight_remat_size = 1
    sizes.sequence_parallel = sizes.fp8_param_gather = False  # shapes are the same
    sizes.use_cpu_initialization, sizes.perform_initialization = True, False
    sizes.init_model_with_meta_device = device == "meta"
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None)
    if "M" in (getattr(args, "hybrid_layer_pattern", None) or ""):  # Mamba's layers draw numbers all the same
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    with quiet.quieted(), torch.device(device):
        config = model_config(sizes)
        builder = config.get_builder_cls()(config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        numbers = [None] if not virtual else list(range(virtual))
        return [builder.build_model(groups, **_ends(stage, args, number), vp_stage=number) for number in numbers]


def _ends(stage: int, args: Any, number: int | None) -> dict[str, bool]:
    """Whether a chunk is the first or last of the model; Megatron's hybrid builder asks for the pipeline stage alone."""
    pp = args.pipeline_model_parallel_size
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
    return {
        "pre_process": stage == 0 and not number,
        "post_process": stage == pp - 1 and (number or 0) == virtual - 1,
    }


def stage_parameters(args: Any, stage: int) -> list[list[Parameter]]:
    """Whole parameters of every chunk of a pipeline stage, in the order in which Megatron registers them."""
    pp = args.pipeline_model_parallel_size
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None)
    with pretended_world(stage, pp, pp=pp, virtual=virtual):
        return [_parameters(chunk) for chunk in build_chunks(args, stage)]


def _parameters(chunk: torch.nn.Module) -> list[Parameter]:
    parameters, unknown = [], []
    for name, param in global_names(chunk, 0):
        kind = find_kind(name)
        if kind is None:
            unknown.append(f"{name} {tuple(param.shape)}")
            continue
        whole = kind.maybe_whole and not getattr(param, "tensor_model_parallel", False)
        layer = re.search(r"^decoder\.layers\.(\d+)\.", name)
        expert = re.search(r"\.experts\.(\d+)\.", name)
        parameters.append(
            Parameter(
                name,
                tuple(param.shape),
                None if whole else kind.cut,
                int(layer[1]) if layer else -1,
                int(expert[1]) if expert else None,
                bool(getattr(param, "shared_embedding", False)),
            )
        )
    if unknown:
        raise UserError(f"{len(unknown)} parameters have no declaration ({', '.join(unknown[:5])}).")
    return parameters
