#!/usr/bin/env python3
"""Background saves side by side: ours, Megatron's queue and torch's `async_save`, in the same training run of one rank, AdamW.

Of each save but a run's first: `stall`, for which the loop stands still (the save and hearing of its end at later steps);
`slower`, what the steps until the next save take beyond the median step of the run, where copying and writing compete with
them; `whole`, seconds until the checkpoint is complete, seen at the end of a step. Medians over saves. `memory`: the most that
the run's processes held together, shared pages counted once (PSS), seen every half second.
"""

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MODES = {
    "sync": "this project, synchronous",
    "ours": "this project, `--async-save`",
    "megatron": "Megatron, forked at each save",
    "megatron-worker": "Megatron, persistent worker",
    "torch": "torch `async_save`, thread",
    "torch-process": "torch `async_save`, process",
}
PATIENCE = 300.0  # seconds for a run
MODELS = {"10M": ("320", "8"), "100M": ("768", "14")}


class Timed:
    """Times of a run's steps and saves."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[float] = []
        self.saves: list[dict[str, float]] = []
        self.began = 0.0

    def step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = original(*args, **kwargs)
        self.steps.append(time.perf_counter() - began)
        return found

    def save(self, original: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        original(iteration, *args, **kwargs)
        self.saves.append({"iteration": iteration, "stall": time.perf_counter() - self.began})

    def finalize(self, original: Any, done: Any, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        original(*args, **kwargs)
        if self.saves:
            last = self.saves[-1]
            last["stall"] += time.perf_counter() - began
            if "whole" not in last and done(int(last["iteration"])):
                last["whole"] = time.perf_counter() - self.began

    def summary(self) -> dict[str, float]:
        usual = statistics.median(self.steps)
        kept = self.saves[1:-1]  # the first plans, the last is waited for
        for save in kept:
            at = int(save["iteration"])
            save["slower"] = sum(self.steps[at : at + self.every]) - usual * self.every
        found = {name: statistics.median(save[name] for save in kept) for name in ("stall", "slower", "whole")}
        return {**found, "first": self.saves[0]["stall"], "step": usual}


def child(mode: str, every: int, target: str, flags: list[str]) -> None:
    """Train in this process with the saves of `mode`; the summary goes to `target`."""
    from megatron_opt import platform
    from megatron_opt.training import entry

    entry.set_single_process_env()
    platform.activate()
    from megatron.training import async_utils, training

    from megatron_opt.checkpointing import folders, saving
    from megatron_opt.training import arguments, job

    args = arguments.parse([*flags, *([] if mode in ("sync", "torch", "torch-process") else ["--async-save"])])
    save = Path(args.save)

    def done(iteration: int) -> bool:
        if mode.startswith("megatron"):
            return bool(async_utils.is_empty_async_queue())
        return running[iteration].done() if mode.startswith("torch") else (save / folders.name_of(iteration)).is_dir()

    running: dict[int, Any] = {}
    if mode.startswith("megatron"):
        saving.install = lambda args: None  # type: ignore[assignment]
        args.use_persistent_ckpt_worker, args.ckpt_assume_constant_structure = mode == "megatron-worker", True
    elif mode.startswith("torch"):
        saving.install = lambda args: None  # type: ignore[assignment]
        training.save_checkpoint = _with_torch(running, save, mode)
    timed, install = Timed(every), saving.install

    def install_and_time(args: Any) -> None:
        install(args)
        training.train_step = functools.partial(timed.step, training.train_step)
        training.save_checkpoint = functools.partial(timed.save, training.save_checkpoint)
        training.maybe_finalize_async_save = functools.partial(timed.finalize, training.maybe_finalize_async_save, done)

    saving.install = install_and_time  # type: ignore[assignment]
    try:
        job.train(args)
    finally:
        if timed.saves:
            Path(target).write_text(json.dumps(timed.summary()))
    entry.exit_process(0)


def _with_torch(running: dict[int, Any], save: Path, mode: str) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

    from megatron_opt.distributed.state import tensors_in_place

    kind = AsyncCheckpointerType.PROCESS if mode == "torch-process" else AsyncCheckpointerType.THREAD

    def save_checkpoint(iteration: int, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for earlier in running.values():
            earlier.result()
        state = {
            name: value for chunk in model for name, value in chunk.state_dict().items() if hasattr(value, "shape")
        }
        state |= {f"optimizer.{n}": value for n, value in enumerate(tensors_in_place(optimizer))}
        folder = save / f"iter_{iteration:07d}"
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True)
        running[iteration] = async_save(state, storage_writer=writer, async_checkpointer_type=kind)

    return save_checkpoint


def _held(pid: int) -> int:
    """Bytes of a process and its children: each page's share."""
    total = 0
    with contextlib.suppress(psutil.Error, OSError):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += 1024 * int(rollup.split("Pss:")[1].split()[0])
    return total


def measure(mode: str, model: str, saves: int, every: int, home: Path) -> dict[str, float] | str:
    """The summary of a run of its own, or why there is none."""
    from tests.cluster.harness import environment, job_flags

    folder, (hidden, layers) = home / mode, MODELS[model]
    folder.mkdir()
    flags = job_flags(folder, (saves + 2) * every, interval=every)
    flags += ["--hidden-size", hidden, "--num-layers", layers, "--num-attention-heads", "8", "--optimizer", "adamw"]
    flags += ["--global-batch-size", "1"]  # little arithmetic, so that the disk and the copies are what is seen
    target = folder / "summary.json"
    command = [sys.executable, __file__, "--child", mode, "--every", str(every), "--target", str(target), "--", *flags]
    peak, ended = [0], threading.Event()
    with open(folder / "stderr", "w") as said:
        run = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )

        def watch() -> None:
            while not ended.wait(0.5):
                peak[0] = max(peak[0], _held(run.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            code = run.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            return "does not end"
        finally:
            ended.set()
            watcher.join()
    saved = (folder / "checkpoints").glob("iter_*")  # torch's last one may be cut short by the end of the run
    size = max((sum(file.stat().st_size for file in one.glob("**/*") if file.is_file()) for one in saved), default=0)
    if not target.is_file():
        lines = [line for line in (folder / "stderr").read_text().splitlines() if "Error" in line]
        return lines[-1][:90] if lines else f"exit code {code}"
    return {**json.loads(target.read_text()), "bytes": size, "memory": peak[0]}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--every", type=int, default=10, metavar="STEPS")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.every, args.target, args.flags)
    print(f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    print(
        "| parameters | saves | stall, ms | first save, ms | slower steps, ms | complete after, ms | step, ms | MB | memory, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in args.models:
        for mode in args.modes:
            with tempfile.TemporaryDirectory() as name:
                found = measure(mode, model, args.saves, args.every, Path(name))
            columns = ("stall", "first", "slower", "whole", "step")
            cells = [found, *"------"] if isinstance(found, str) else [f"{1e3 * found[name]:.1f}" for name in columns]
            cells += [] if isinstance(found, str) else [f"{found[name] / 1e6:.0f}" for name in ("bytes", "memory")]
            print(f"| {model} | {MODES[mode]} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
