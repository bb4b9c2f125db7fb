"""Small all-reduces and broadcasts of ranks on one host through shared memory, in place of gloo's sockets.

A tensor-parallel run of the tests makes thousands of them, and a socket's round costs milliseconds where ranks outnumber
cores. Ranks are summed in their order, so that all get the same bits. `MEGATRON_OPT_TEST_TRANSPORT=gloo` leaves gloo alone.
"""

import hashlib
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SLOT = 1 << 18  # bytes; larger tensors travel by gloo
_LINE = 8  # int64 counters of one rank: a cache line of its own
_TIMEOUT = 100.0  # seconds
_TYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


def _hall(folder: Path) -> Path:
    return Path("/dev/shm") / f"megatron_opt-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"


def room_of(folder: Path, case: str) -> Path:
    """Where the ranks of a run meet: in memory, named after the batch's own folder."""
    made = _hall(folder) / case
    made.mkdir(parents=True, exist_ok=True)
    return made


def leave(folder: Path) -> None:
    """Give back what a batch's runs shared."""
    shutil.rmtree(_hall(folder), ignore_errors=True)


class _Done:
    """A finished asynchronous work."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


class _Room:
    """Shared memory of one process group: a counter and two slots for each rank."""

    def __init__(self, path: Path, rank: int, size: int) -> None:
        counters, self.rank, self.size, self.turn = size * _LINE * 8, rank, size, 0
        length = counters + 2 * size * _SLOT
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(file, length)
        memory = torch.frombuffer(mmap.mmap(file, length), dtype=torch.uint8)
        os.close(file)
        self.arrived = memory[:counters].view(torch.int64)[::_LINE].numpy()
        self.slots = memory[counters:].view(2, size, _SLOT)

    def meet(self, given: Tensor) -> list[Tensor]:
        """What every rank gives, of one shape; a slot is written again only after all ranks have come to the next turn."""
        self.turn += 1
        slots = self.slots[self.turn % 2][:, : given.nbytes]
        slots[self.rank].copy_(given.reshape(-1).view(torch.uint8))
        self.arrived[self.rank] = self.turn
        deadline, tries = time.monotonic() + _TIMEOUT, 0
        while self.arrived.min() < self.turn:
            tries += 1
            os.sched_yield() if tries % 64 else time.sleep(1e-4)
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks did not meet: {self.arrived.tolist()}, turn {self.turn}")
        return [slot.view(given.dtype).view(given.shape) for slot in slots]


def _combine(op: Any, parts: list[Tensor]) -> Tensor:
    stack = torch.stack(parts)
    if op == dist.ReduceOp.MAX:
        return stack.amax(0)
    if op == dist.ReduceOp.MIN:
        return stack.amin(0)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total / len(parts) if op == dist.ReduceOp.AVG else total


def install(folder: Path) -> None:
    """Replace torch.distributed's all_reduce and broadcast in this process; `folder` is one run's, in memory."""
    rooms: dict[str, _Room | None] = {}

    def room(group: Any, tensor: Tensor) -> _Room | None:
        if tensor.device.type != "cpu" or tensor.dtype not in _TYPES or not 0 < tensor.nbytes <= _SLOT:
            return None
        group = dist.group.WORLD if group is None else group
        if group is None or group == dist.GroupMember.NON_GROUP_MEMBER or dist.get_world_size(group) == 1:
            return None
        ranks = dist.get_process_group_ranks(group)
        name = "-".join(map(str, (group.group_name, *ranks)))
        if name not in rooms:
            rooms[name] = _Room(folder / name, dist.get_rank(group), len(ranks))
        return rooms[name]

    sockets_reduce, sockets_broadcast = dist.all_reduce, dist.broadcast
    reducible = (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.AVG)

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        shared = room(group, tensor) if op in reducible else None
        if shared is None:
            return sockets_reduce(tensor, op, group, async_op)
        with torch.no_grad():
            tensor.copy_(_combine(op, shared.meet(tensor.detach())))
        return _Done() if async_op else None

    def broadcast(
        tensor: Tensor, src: int | None = None, group: Any = None, async_op: bool = False, group_src: int | None = None
    ) -> Any:
        shared = room(group, tensor)
        if shared is None:
            return sockets_broadcast(tensor, src, group, async_op, group_src)
        given = shared.meet(tensor.detach())
        source = group_src if group_src is not None else dist.get_group_rank(group or dist.group.WORLD, src)
        with torch.no_grad():
            tensor.copy_(given[source])
        return _Done() if async_op else None

    dist.all_reduce, dist.broadcast = all_reduce, broadcast
