"""A torch parameter as a source of shards: what DTensor's placements leave on this rank, its gradient, its main copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from megatron_opt.distributed.param_shards import ParamShard
from megatron_opt.errors import UserError

DTYPES = (torch.float32, torch.bfloat16)


def local_of(param: Any) -> Tensor:
    """This rank's part of a tensor, without its history."""
    tensor = param.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_axes(name: str, param: Any) -> list[Tensor]:
    """By side of a parameter, the global indices that this rank holds, ascending; empty ones where it holds nothing.

    Placements act from the first mesh dimension to the last: Shard cuts what is left into as many runs as the mesh has
    ranks there (the last ones shorter, or empty), Replicate leaves it, FSDP's strided shard over tensor parallelism cuts
    each of `split_factor` runs so. UserError for any other placement, Partial among them.
    """
    axes = [torch.arange(size) for size in param.shape]
    if not isinstance(param, DTensor):
        return axes
    if hasattr(param, "megatron_fsdp_dist_index") or hasattr(param, "_megatron_fsdp_model"):
        raise UserError(
            f"{name} is sharded by Megatron-FSDP, whose shards do not lie where their placements say; use torch's fully_shard."
        )
    where = param.device_mesh.get_coordinate()
    if where is None:
        return [axis[:0] for axis in axes]
    for placement, ranks, at in zip(param.placements, param.device_mesh.shape, where, strict=True):
        if isinstance(placement, Replicate):
            continue
        if not isinstance(placement, Shard | _StridedShard):
            raise UserError(
                f"{name} is placed as {placement} on its mesh; an optimizer takes parameters that are Shard or Replicate, not Partial."
            )
        axis = axes[placement.dim]
        runs: Sequence[Tensor] = [axis]
        if isinstance(placement, _StridedShard):
            runs = _chunks(axis, int(placement.split_factor))
        axes[placement.dim] = torch.cat([_chunks(run, int(ranks))[at] for run in runs])
    local_shape = tuple(local_of(param).shape)
    if local_shape != tuple(len(axis) for axis in axes):
        raise UserError(
            f"{name}: {param.placements} leave {local_shape} here, not {tuple(len(axis) for axis in axes)}; shard it evenly."
        )
    if any(bool((axis[1:] <= axis[:-1]).any()) for axis in axes):
        raise UserError(f"{name}: {param.placements} do not keep the order of its rows; shard it otherwise.")
    return axes


def _chunks(axis: Tensor, count: int) -> Sequence[Tensor]:
    """As torch.chunk, with empty ones so that there are `count`."""
    chunks = list(axis.chunk(count))
    return chunks + [axis[:0]] * (count - len(chunks))


@dataclass(eq=False)
class TensorShard(ParamShard):
    """A whole local tensor of a torch parameter.

    The fp32 main copy is the parameter's own memory where it is fp32 and contiguous. Values that the model got from
    elsewhere since the last step (a loaded checkpoint, say) are taken over by `refresh`.
    """

    overwritten: bool = False  # a step writes into the memory that `grad` returns, and the user's gradient must stay

    @staticmethod
    def of(view: Any, rects: Any) -> "TensorShard":
        local = local_of(view.param)
        own = local.dtype == torch.float32 and local.is_contiguous()
        main = local.view(-1) if own else local.reshape(-1).clone().float()
        return TensorShard(view, 0, local.numel(), main, rects)

    def has_grad(self) -> bool:
        return self.view.param.grad is not None

    def grad(self) -> Tensor | None:
        param: Any = self.view.param
        grad = param.grad
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise UserError(f"the gradient of {self.view.name} is sparse; make it dense (nn.Embedding(sparse=False)).")
        if isinstance(grad, DTensor) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)  # tensor parallelism leaves some Partial
        flat = local_of(grad).reshape(-1).float()
        same = flat.data_ptr() == local_of(param.grad).data_ptr()
        return flat.clone() if same and self.overwritten else flat

    def model_copy(self) -> Tensor | None:
        local = local_of(self.view.param)
        return local.view(-1) if local.dtype == torch.bfloat16 and local.is_contiguous() else None

    def publish(self) -> None:
        local = local_of(self.view.param)
        if not self._is_own(local):
            local.copy_(self.main.view(local.shape))

    def refresh(self) -> None:
        """Follow a parameter whose memory has moved (FSDP pads it at its first forward pass) or whose values have changed."""
        local = local_of(self.view.param)
        if local.numel() != self.main.numel() or local.dtype not in DTYPES or local.device != self.main.device:
            raise UserError(
                f"{self.view.name} has become {local.dtype} {tuple(local.shape)} on {local.device} since the optimizer was "
                "made; make the optimizer after the model has its type, device and shards."
            )
        if local.dtype == torch.float32 and local.is_contiguous():
            self.main = local.view(-1)
            return
        flat = local.reshape(-1)
        if self._is_own(local):  # the parameter was fp32 and contiguous before
            self.main = self.main.clone()
        torch.where(flat == self.main.to(flat.dtype), self.main, flat.float(), out=self.main)

    def _is_own(self, local: Tensor) -> bool:
        return local.data_ptr() == self.main.data_ptr()


def check_parameters(named: Sequence[tuple[str, Any]]) -> torch.device:
    """The one device of all parameters; UserError for what no optimizer here can train."""
    seen: dict[int, str] = {}
    devices: dict[torch.device, str] = {}
    for name, param in named:
        if not isinstance(param, Tensor):
            raise UserError(f"{name} is {type(param).__name__}, no tensor; give model.named_parameters() or the model.")
        if id(param) in seen:
            raise UserError(f"the parameter {name} was given before, as {seen[id(param)]}; give it once.")
        seen[id(param)] = name
        if type(param).__name__ == "FlatParameter":
            raise UserError(f"{name} is flattened by FSDP 1, which forgets matrices; shard the model by fully_shard.")
        if param.dtype not in DTYPES:
            raise UserError(f"{name} is {param.dtype}; parameters are torch.float32 or torch.bfloat16 here.")
        if param.layout != torch.strided:
            raise UserError(f"{name} is {param.layout}; parameters are dense here.")
        if not param.numel():
            raise UserError(f"{name} has no elements {tuple(param.shape)}; freeze or remove it.")
        devices.setdefault(local_of(param).device, name)
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two parameters are called {twice[0]}; give each a name of its own.")
    if len(devices) > 1:
        (one, a), (two, b) = list(devices.items())[:2]
        raise UserError(f"{a} is on {one} and {b} on {two}; an optimizer's parameters are on one device.")
    if (device := next(iter(devices))).type == "meta":
        raise UserError("parameters are on meta; make the optimizer after to_empty() and the initialization.")
    return device
