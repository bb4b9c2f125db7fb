"""One process of the pool: makes its share of the cases one after another, Megatron imported once."""

import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opt import platform
from megatron_opt.distributed.exchange import Trip
from megatron_opt.errors import UserError
from tests.distributed.cases import Case, Layout

# what a run puts its own functions into
_MODULES = (
    "megatron.training.training", "megatron.training.arguments", "megatron.training.checkpointing", "megatron_opt.training.job"
)


def run_case(case: Case, rank: int, folder: Path, data: str) -> dict[str, Any]:
    """Train as the case says in a process group of its own; what happened, or the error."""
    from megatron.training import training

    from megatron_opt.training import arguments, job
    from tests.distributed import hooks, recording

    originals = {name: dict(vars(sys.modules[name])) for name in _MODULES}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/{case.name}.store", rank=rank, world_size=case.ranks,
        timeout=timedelta(seconds=100),
    )
    record, finish = recording.Record(), Trip.finish
    started = time.time()
    try:
        record.watch(training, job)
        argv = [*case.argv(data), "--data-cache-path", str(folder / "cache")]
        if case.hook:
            argv = getattr(hooks, case.hook)(case, record, argv, folder) or argv
        args = arguments.parse(argv)
        try:
            job.train(args)
        except SystemExit as stopped:  # --exit-interval
            if stopped.code:
                raise
        found = record.finish()
    except UserError as error:
        found = {"user_error": str(error), **record.partial()}
    except BaseException as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}", **record.partial()}
    finally:
        Trip.finish = finish  # type: ignore[method-assign]  # monitoring times it
        for name, saved in originals.items():
            vars(sys.modules[name]).update(saved)
        training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))  # type: ignore[attr-defined]
        training.destroy_global_state()
        dist.destroy_process_group()
        torch.set_default_dtype(torch.float32)
    return {**found, "seconds": time.time() - started}


def serve(folder: Path, me: int, data: str) -> None:
    """Make this member's share of every batch `plan.N.json` that appears in the folder, until the parent is gone."""
    parent, number = os.getppid(), 0
    while True:
        path = folder / f"plan.{number}.json"
        while not path.exists():
            if os.getppid() != parent:
                os._exit(0)
            time.sleep(0.05)
        for entry in json.loads(path.read_text()):
            if me not in entry["members"]:
                continue
            layout = Layout(entry["layout"]["name"], entry["layout"]["ranks"], tuple(entry["layout"]["flags"]))
            case = Case(
                entry["name"], layout, tuple(entry["flags"]), entry["steps"], entry["hook"], entry["options"]
            )
            rank = entry["members"].index(me)
            found = run_case(case, rank, folder / str(number), data)
            target = folder / str(number) / f"{case.name}.{rank}.pt"
            torch.save(found, f"{target}.part")
            os.replace(f"{target}.part", target)
        number += 1


def main(folder: Path, members: int, data: str) -> None:
    """Import once, then fork: a member costs no second import."""
    torch.set_num_threads(1)
    platform.activate()
    import megatron.training.arguments
    import megatron.training.training

    import megatron_opt.training.job  # noqa: F401
    from megatron_opt.optimizers import registry

    registry.rules()
    parent = os.getppid()
    for member in range(members):
        if os.fork() == 0:
            log = os.open(folder / f"member{member}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                serve(folder, member, data)
            finally:
                os._exit(1)
    while os.getppid() == parent:  # the members end when this process does
        time.sleep(0.2)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
