"""Jobs of two ranks of which one ends badly: forked from here, which has imported torch once.

Arguments: a folder and names of jobs. Prints {job: [exit codes, seconds, what the ranks said]}.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_opt.errors import UserError
from megatron_opt.training import entry, failing

LIMIT = 40.0  # seconds for a job, far below the 30 minutes for which gloo's ranks wait for each other


def job(name: str, rank: int) -> int:
    failing.listen()
    if name == "alike" or (name == "before they meet" and rank == 1):
        return entry.print_user_error("job", UserError("the data is not there"))
    dist.init_process_group("gloo")
    if name == "exception" and rank == 1:
        raise RuntimeError("out of memory")
    if name == "in a step" and rank == 0:
        return entry.print_user_error("job", UserError("the disk is full"))
    if name == "well":
        dist.barrier()
        return 0
    time.sleep(10 * LIMIT)  # as a collective that does not notice that the other rank is gone
    return 3


def start(name: str, rank: int, port: int, said: Path) -> int:
    """A rank as srun starts it: no agent."""
    if child := os.fork():
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    entry.run(lambda: job(name, rank))


def outcome(name: str, folder: Path) -> tuple[list[int], float, str]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    began, said = time.monotonic(), folder / f"{name}.txt"
    ranks = [start(name, rank, port, said) for rank in (0, 1)]
    codes: dict[int, int] = {}
    while len(codes) < 2:
        for rank in set(ranks) - codes.keys():
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > began + LIMIT:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[rank] for rank in ranks], time.monotonic() - began, said.read_text()


if __name__ == "__main__":
    print(json.dumps({name: outcome(name, Path(sys.argv[1])) for name in sys.argv[2:]}))
