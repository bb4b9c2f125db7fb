"""Ranks of a plain torch program: forked from a server that has imported torch once, gone after one function."""

import fcntl
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120.0  # seconds for a whole function
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.torch.cases"])


def _serve(function: Callable[..., Any], rank: int, size: int, folder: str, args: tuple[Any, ...], queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
        queue.put((rank, None))
    except BaseException as error:
        queue.put((rank, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What the function returns on each of `size` gloo ranks; its first error, if it has one."""
    with (
        open(Path(tempfile.gettempdir()) / "megatron_opt-ranks.lock", "w") as turn,
        tempfile.TemporaryDirectory() as folder,
    ):
        fcntl.flock(turn, fcntl.LOCK_EX)  # as tests.distributed.pool: ranks of two sessions would starve each other
        queue = _SERVER.Queue()
        ranks = [
            _SERVER.Process(target=_serve, args=(function, rank, size, folder, args, queue), daemon=True)
            for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        done = set[int]()
        try:
            while len(done) < size:
                rank_number, error = queue.get(timeout=PATIENCE)
                assert error is None, error
                done.add(rank_number)
        finally:
            for process in ranks:
                process.join(10 if len(done) == size else 0.1)
                process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(size)]
