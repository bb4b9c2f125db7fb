"""A checkpoint's model on this rank of a TP×PP layout, and its logits; in fp32, on this rank's GPU or on CPU.

Megatron's own sharded state dict says which part of each stored tensor this rank reads.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_opt import quiet
from megatron_opt.checkpointing import other_layers
from megatron_opt.errors import UserError
from megatron_opt.export import model as models
from megatron_opt.export.kv_cache import Reader
from megatron_opt.kernels.host import current_device


def check_layout(saved: Any, tp: int, pp: int) -> None:
    """Raise UserError, naming the flag, for a layout that cannot cut this model."""
    if getattr(saved, "hybrid_layer_pattern", None) and pp > 1:
        raise UserError("--pipeline-model-parallel-size above 1 does not cut a hybrid model here; cut it by TP alone.")
    if saved.num_layers % pp:
        raise UserError(
            f"--pipeline-model-parallel-size {pp} does not divide the model's {saved.num_layers} layers; give one that does."
        )
    grouped = getattr(saved, "group_query_attention", False)
    sizes = {
        "attention heads": saved.num_attention_heads,
        "query groups": saved.num_query_groups if grouped else None,
        "ids of the padded vocabulary": saved.padded_vocab_size,
        "columns of the MLP": saved.ffn_hidden_size,
    }
    for what, size in sizes.items():
        if size and size % tp:
            raise UserError(
                f"--tensor-model-parallel-size {tp} does not divide the model's {size} {what}; give one that does."
            )


class RankModel:
    """This rank's stage and shard of a model; inside `ranks.world`."""

    def __init__(self, source: Any, tp: int, pp: int, earlier: Sequence[Any] = ()):
        """`source`: a `reading.Checkpoint`, of which this rank reads its part; with `earlier` ones the mean of all, added in fp64."""
        from megatron.core import mpu, tensor_parallel

        from megatron_opt.distributed.meta_model import build_chunks

        self.flags = models.of_checkpoint(source.args)
        args = Namespace(**vars(self.flags))
        args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size = pp, None
        args.moe_expert_capacity_factor = None  # a capacity would let an answer depend on its neighbours in the batch
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        self.stage = mpu.get_pipeline_model_parallel_rank()
        built: list[Any] = build_chunks(args, self.stage, tp=tp, etp=tp, device="cpu")  # Any: not all is a Module's
        (self._model,) = built
        self.first, self.last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
        total: dict[str, Any] = {}
        for one in (source, *earlier):
            for name, value in self._read(one).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    total[name] = total.get(name, 0.0) + value.double() / (1 + len(earlier))
                else:
                    total.setdefault(name, value)
        self._model.load_state_dict(total)
        if source.averages is not None:
            self._take(source, tp)
        self._device = current_device()
        self._model._apply(lambda tensor: tensor.to(self._device))  # `to` is the CPU's where there is no GPU
        self._model.eval()

    def _read(self, source: Any) -> dict[str, Any]:
        """This rank's part of a checkpoint's model."""
        from megatron.core import dist_checkpointing, mpu

        metadata = dict(source.content_metadata or {})
        metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
        wanted = {"model": self._model.sharded_state_dict(metadata=metadata)}
        try:
            with quiet.quieted():
                wanted = other_layers.adapted(wanted, source.folder)
                loaded = dist_checkpointing.load(wanted, str(source.folder), validate_access_integrity=False)
        except Exception as error:
            raise UserError(
                f"the checkpoint {source.folder} cannot be read into the model of its flags: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        model: dict[str, Any] = loaded["model"]
        return model

    @torch.no_grad()
    def _take(self, source: Any, tp: int) -> None:
        """This rank's shards of the checkpoint's averages."""
        from megatron.core import mpu

        from megatron_opt.layout.matrices import cut_side
        from megatron_opt.layout.names import global_names

        rank = mpu.get_tensor_model_parallel_rank()
        for name, parameter in global_names(self._model, 0):
            side = cut_side(name, parameter, not getattr(parameter, "allreduce", True), tp)
            parameter.copy_(source.averages(name, parameter, rank, tp, side).to(source.dtype))  # as `generate` has it

    def reader(self, rows: int, length: int) -> Reader:
        """For texts of at most `length` ids that are read on."""
        return Reader(self.logits, self.flags, rows, length)

    @torch.no_grad()
    def logits(self, ids: Tensor, start: int = 0, context: Any = None) -> Tensor | None:
        """(batch, sequence, padded vocabulary), fp32, of ids (batch, sequence) on the last stage; None on the others.

        Each stage gets from the one before and goes on with the next batch while the one behind computes. `start`: the position
        of the first; `context`: Megatron's inference context, which holds what stands before.
        """
        import torch.distributed as dist
        from megatron.core import mpu

        if not self.first:
            hidden = torch.empty(ids.shape[1], ids.shape[0], self.flags.hidden_size, device=self._device)
            dist.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
            self._model.set_input_tensor(hidden)
        positions = torch.arange(start, start + ids.shape[1])[None].expand_as(ids).to(self._device)
        logits = self._model(
            ids.to(self._device), positions, None, inference_context=context, runtime_gather_output=True
        )
        if self.last:
            return logits.float()
        dist.send(logits.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
        return None
