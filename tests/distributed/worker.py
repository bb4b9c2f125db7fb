"""The pool's processes: a launcher imports Megatron once, its members fork a fresh process for every run."""

import argparse
import contextlib
import ctypes
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_opt import platform
from megatron_opt.errors import UserError
from tests.distributed import transport
from tests.distributed.cases import Case, Layout

CASE_TIMEOUT = 150.0  # seconds


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(prctl_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)


def make_run(case: Case, rank: int, folder: Path, data: str) -> dict[str, Any]:
    """Train as the case says in a process group of its own; what happened, or the error."""
    from megatron.training import training

    from megatron_opt.training import arguments, job
    from tests.distributed import hooks, recording

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case.ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{case.name}.store",
        rank=rank,
        world_size=case.ranks,
        timeout=timedelta(seconds=100),
    )
    if os.environ.get("MEGATRON_OPT_TEST_TRANSPORT", "memory") != "gloo":
        transport.install(transport.room_of(folder, case.name))
    record, started = recording.Record(), time.time()
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
    return {**found, "seconds": time.time() - started}


def _make_run_and_write(entry: dict[str, Any], me: int, folder: Path, data: str) -> None:
    layout = Layout(entry["layout"]["name"], entry["layout"]["ranks"], tuple(entry["layout"]["flags"]))
    case = Case(entry["name"], layout, tuple(entry["flags"]), entry["steps"], entry["hook"], entry["options"])
    rank = entry["members"].index(me)
    print(f"=== {case.name}, rank {rank}", flush=True)
    found = make_run(case, rank, folder, data)
    target = folder / f"{case.name}.{rank}.pt"
    torch.save(found, f"{target}.part")
    os.replace(f"{target}.part", target)


def _in_a_child(function: Any, *args: Any) -> None:
    """Call a function in a forked process, so that nothing of a run stays; kill it when it takes too long."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + CASE_TIMEOUT
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.01)


def serve(folder: Path, me: int, data: str) -> None:
    """Make this member's share of every batch `plan.N.json` that appears in the folder."""
    die_with_parent()
    number = 0
    while True:
        path = folder / f"plan.{number}.json"
        while not path.exists():
            time.sleep(0.02)
        for entry in json.loads(path.read_text()):
            if me in entry["members"]:
                _in_a_child(_make_run_and_write, entry, me, folder / str(number), data)
        number += 1


# all that a run imports at one time or another
MODULES = (
    "megatron.core.datasets.gpt_dataset megatron.core.tokenizers.text megatron.core.tokenizers.text.models "
    "megatron.training.initialize megatron.training.training megatron_opt._C megatron_opt.checkpointing.resuming "
    "megatron_opt.checkpointing.other_layers megatron_opt.distributed.build megatron_opt.distributed.meta_model "
    "megatron_opt.distributed.planning megatron_opt.platform.hybrid_stack megatron_opt.training.arguments "
    "megatron_opt.training.batches megatron_opt.training.curvature megatron_opt.training.flags.checks "
    "megatron_opt.training.job megatron_opt.training.monitoring tests.distributed.hooks tests.distributed.recording"
).split()


def warm() -> None:
    """Import what runs need, and read the help texts of Megatron's flags once: it parses its own sources for them, in every run."""
    for module in MODULES:
        with contextlib.suppress(ModuleNotFoundError):  # the extension may not be built
            importlib.import_module(module)

    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    from megatron_opt.optimizers import registry

    factory: Any = ArgumentGroupFactory
    read, reader = factory._get_field_docstrings, object.__new__(ArgumentGroupFactory)
    known = functools.cache(lambda config: read(reader, config))
    factory._get_field_docstrings = lambda self, config: dict(known(config))
    add_megatron_arguments(argparse.ArgumentParser())
    registry.optimizers()


def main(folder: Path, members: int, data: str, transformer_engine: bool = False) -> None:
    """Import once, then fork: neither a member nor a run costs a second import."""
    die_with_parent()
    torch.set_num_threads(1)
    platform.activate(transformer_engine)

    warm()
    for member in range(members):
        if os.fork() == 0:
            log = os.open(folder / f"member{member}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                serve(folder, member, data)
            finally:
                os._exit(1)
    os.wait()  # members do not end by themselves
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], "transformer_engine" in sys.argv[4:])
