"""NCCL's rules, kept where gloo forgives: what every collective of this process does, checked against them and the other ranks.

Within a rank, at the call: tensors that travel lie contiguous, are marked as the GPU's (`everything_is_a_gpus`: gloo's tensors
are on the CPU, so a mark must say what would be on the device), and are not those of a collective under way, nor are they
written while it is. Across ranks, afterwards: members of a group have called the same collectives on it, in one order, with
types and sizes that fit, and nobody leaves one without having waited for it.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Collectives by the arguments that hold their tensors, what they write first.
TENSORS = {
    "all_reduce": ("tensor",),
    "broadcast": ("tensor",),
    "reduce": ("tensor",),
    "all_to_all_single": ("output", "input"),
    "all_gather_single": ("output_tensor", "input_tensor"),  # `all_gather_into_tensor` calls it,
    "reduce_scatter_single": ("output", "input"),  # `reduce_scatter_tensor` this
    "all_gather": ("tensor_list", "tensor"),
    "reduce_scatter": ("output", "input_list"),
    "all_to_all": ("output_tensor_list", "input_tensor_list"),
}
SIZED = ("all_reduce", "broadcast", "reduce")  # equal on all ranks; of others, splits may differ


@dataclass
class Under:
    """A collective under way: its tensors, and their versions when it began."""

    call: str
    tensors: list[Tensor]
    versions: list[int]


@dataclass
class Rules:
    """What this rank has called by group, and which rules it has broken."""

    calls: dict[str, list[str]] = field(default_factory=dict)  # by the group's ranks: collective, type, sizes
    broken: list[str] = field(default_factory=list)
    in_flight: list[Under] = field(default_factory=list)
    is_on_gpu: Callable[[Tensor], bool] = lambda tensor: True

    def begin(self, name: str, tensors: list[Tensor], group: Any) -> Under:
        """Check a call and note it."""
        ranks = ",".join(map(str, dist.get_process_group_ranks(group or dist.group.WORLD)))
        sizes = [t.numel() for t in tensors] if name in SIZED else []
        call = " ".join(map(str, (name, *{str(t.dtype) for t in tensors}, *sizes)))
        self.calls.setdefault(ranks, []).append(call)
        for tensor in tensors:
            if not tensor.is_contiguous():
                self.broken.append(f"{call}: a tensor {tuple(tensor.shape)} with strides {tensor.stride()}")
            if not self.is_on_gpu(tensor):
                self.broken.append(f"{call}: a tensor {tuple(tensor.shape)} of the CPU on a group of GPUs")
            for other in self.in_flight:
                if any(_overlap(tensor, busy) for busy in other.tensors):
                    self.broken.append(f"{call}: a tensor of {other.call}, which nobody has waited for")
        under = Under(call, tensors, [t._version for t in tensors])
        self.in_flight.append(under)
        return under

    def end(self, under: Under) -> None:
        """Waited for: nothing may have been written meanwhile."""
        if under not in self.in_flight:
            return
        self.in_flight.remove(under)
        for tensor, version in zip(under.tensors, under.versions, strict=True):
            if tensor._version != version:
                self.broken.append(f"{under.call}: a tensor {tuple(tensor.shape)} was written while it travelled")

    def finish(self) -> dict[str, list[str]]:
        """Calls by group; raises AssertionError where a rule was broken or a collective was never waited for."""
        broken = self.broken + [f"{under.call}: nobody has waited for it" for under in self.in_flight]
        assert not broken, "; ".join(broken[:5])
        return self.calls


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.numel() * b.element_size() and second < first + a.numel() * a.element_size()


class _Work:
    """A work whose wait is noted."""

    def __init__(self, work: Any, done: Callable[[], None]) -> None:
        self._work, self._done = work, done

    def wait(self, *args: Any) -> Any:
        found = self._work.wait(*args)
        self._done()
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def install(is_on_gpu: Callable[[Tensor], bool] | None = None) -> Rules:
    """Wrap torch.distributed's collectives in this process."""
    rules = Rules()
    if is_on_gpu is not None:
        rules.is_on_gpu = is_on_gpu
    for name, places in TENSORS.items():
        plain = getattr(dist, name)
        checked = _checked(rules, name, plain, places)
        for module in [
            module for key, module in sys.modules.items() if key.startswith(("torch.distributed", "megatron"))
        ]:
            for attribute in [key for key, value in vars(module).items() if value is plain]:
                setattr(module, attribute, checked)  # Megatron keeps some under names of its own
    return rules


def _checked(rules: Rules, name: str, call: Callable[..., Any], places: tuple[str, ...]) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        found = [given[place] for place in places]
        tensors = [t for x in found for t in (x if isinstance(x, list | tuple) else [x])]
        if not tensors:
            return call(*args, **kwargs)
        under = rules.begin(name, tensors, given.get("group"))
        work = call(*args, **kwargs)
        under.versions = [t._version for t in tensors]  # the call itself counts as a write
        if work is None or not given.get("async_op"):
            rules.end(under)
            return work
        return _Work(work, lambda: rules.end(under))

    return checked


def same_order(ranks: list[dict[str, list[str]]]) -> None:
    """Members of every group have called the same collectives in one order: on NCCL anything else hangs or garbles."""
    groups = sorted({group for calls in ranks for group in calls})
    for group in groups:
        members = [int(rank) for rank in group.split(",")]
        lists = [ranks[member].get(group, []) for member in members]
        for member, calls in zip(members[1:], lists[1:], strict=True):
            at = next((i for i, (a, b) in enumerate(zip(lists[0], calls)) if a != b), min(len(lists[0]), len(calls)))
            assert calls == lists[0], (
                f"group {group}, collective {at}: rank {members[0]} calls {lists[0][at : at + 1] or 'nothing'}, "
                f"rank {member} {calls[at : at + 1] or 'nothing'}"
            )


def everything_is_a_gpus(tensor: Tensor) -> bool:
    """The default mark: what Megatron and we give to a group is where `current_device` says."""
    return tensor.device == torch.device(torch.cuda.current_device())
