"""What Megatron-Core 0.19.2 does only on CUDA, done on the CPU: uneven collectives of MoE, random number states."""

from typing import Any

import torch
from torch import Tensor

from megatron_opt.platform.replacement import Replacement


def _to_list(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """all_to_all takes split sizes as lists; Megatron turns them into such only when they come from a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gathered(input_: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
    """Megatron's function, with unequal splits (tokens of experts cut over tensor-parallel ranks) as gloo can."""
    if output_split_sizes is None or group.size() == 1:
        return GATHER.original()(input_, group, output_split_sizes, use_global_buffer)  # type: ignore[no-any-return]
    sizes = [int(size) for size in output_split_sizes]
    padded = input_.new_zeros(max(sizes), *input_.shape[1:])
    padded[: len(input_)] = input_
    pieces = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])


def _scattered(input_: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
    """Likewise."""
    if input_split_sizes is None or group.size() == 1:
        return SCATTER.original()(input_, group, input_split_sizes, use_global_buffer)  # type: ignore[no-any-return]
    total = input_.clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()


def _set_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _fork(self: Any, name: str = "model-parallel-rng") -> Any:
    """The tracker's fork without its warning that the CPU generator moved: here it is the one that should."""
    from contextlib import contextmanager

    @contextmanager
    def forked() -> Any:
        if name not in self.states_:
            raise KeyError(f"RNG state {name} is not added")
        before, before_name = torch.get_rng_state(), self._current_state_name
        if before_name != "default-rng":
            self.states_[before_name] = before
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)
            self._current_state_name = before_name

    return forked()


_MAPPINGS, _RANDOM = "megatron.core.tensor_parallel.mappings", "megatron.core.tensor_parallel.random"
GATHER = Replacement(_MAPPINGS, "_gather_along_first_dim", _gathered)
SCATTER = Replacement(_MAPPINGS, "_reduce_scatter_along_first_dim", _scattered)
REPLACEMENTS = (
    GATHER,
    SCATTER,
    Replacement("megatron.core.datasets.utils", "compile_helpers", lambda: None),  # the wheel carries them compiled
    Replacement(_RANDOM, "_set_cuda_rng_state", _set_rng_state),
    Replacement(_RANDOM, "_get_cuda_rng_state", _get_rng_state),
    Replacement(f"{_RANDOM}:CudaRNGStatesTracker", "fork", _fork),
    Replacement("megatron.core.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", _to_list),
    Replacement("megatron.core.transformer.moe.token_dispatcher", "maybe_move_tensor_to_cpu", _to_list),
)
