"""What to do about a hang and about a loss that jumps; what torch and Megatron do not do themselves.

Hang: a thread of each rank watches its start and its training loop. When no step has ended for the time limit, it posts where its
main thread stands to the job's store, and rank by rank the log tells who waits in which collective and who does not.
All ranks then leave, so that torchrun restarts them.

Loss: `skip` leaves out the update of a step whose loss is not finite or a multiple of the recent median; `rollback`
goes back to a checkpoint at least n steps old and skips the data since (Megatron's --iterations-to-skip).
"""

import argparse
import functools
import json
import linecache
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_opt import patches
from megatron_opt.checkpointing import folders
from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic
from megatron_opt.training import events, stragglers

HANG_EXIT = 70
ROLLBACK_EXIT = 75  # EX_TEMPFAIL: start the same command again
SKIP_FILE = "iterations_to_skip.json"
_WINDOW = 32
_LEAST = 8  # losses seen before one can be called a spike


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of hang detection and of losses that jump."""
    group = parser.add_argument_group("megatron_opt faults")
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="SECONDS",
        help="a rank that makes no step for so long is reported and the ranks leave, for a restart "
        "(default: nine tenths of --distributed-timeout-minutes; 0: never)",
    )
    group.add_argument(
        "--on-loss-spike",
        choices=["ignore", "skip", "rollback"],
        default="ignore",
        help="a loss that is not finite or above --loss-spike-factor times the recent median: train on, "
        "leave the step's update out, or go back --rollback-steps and skip the data since",
    )
    group.add_argument(
        "--loss-spike-factor",
        type=float,
        default=2.0,
        metavar="X",
        help=f"what counts as a spike, times the median of the last {_WINDOW} losses (default 2)",
    )
    group.add_argument(
        "--rollback-steps",
        type=int,
        default=0,
        metavar="N",
        help="go back to the newest checkpoint at least N steps before the spike (default 0)",
    )


def check(args: Any) -> None:
    """Refuse a watch for spikes that cannot do what it is asked."""
    if args.on_loss_spike != "ignore":
        if args.loss_spike_factor <= 1:
            raise UserError(f"--loss-spike-factor {args.loss_spike_factor} calls every loss a spike; give more than 1.")
        if args.on_loss_spike == "rollback" and not args.save:
            raise UserError("--on-loss-spike rollback goes back to a checkpoint; give --save and --save-interval.")


def install(args: Any) -> None:
    """Put both watches into Megatron's loop; call once, after its arguments are validated."""
    check(args)
    if args.on_loss_spike != "ignore":
        watch = LossWatch(args.loss_spike_factor)
        patches.wrap(
            "megatron.training.training.train_step",
            "training/faults.py",
            lambda step: functools.partial(_guarded_step, step, watch),
        )
    if args.save:
        args.iterations_to_skip = sorted({*args.iterations_to_skip, *skipped_iterations(Path(args.save))})
    longest = 0.9 * 60 * args.distributed_timeout_minutes
    limit = longest if args.hang_timeout is None else args.hang_timeout
    if limit > 0:
        hang = HangWatch(limit, max(limit, longest))
        hang.start()
        patches.wrap(
            "megatron.training.training.checkpoint_and_decide_exit",
            "training/faults.py",
            lambda decide: functools.partial(_watched_step_end, decide, hang),
        )


# ---- loss


class LossWatch:
    """Says whether a loss is a spike, by the median of those before it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=_WINDOW)
        self.spikes = 0

    def spike(self, loss: float) -> bool:
        """Count and tell; a loss that is none joins the window."""
        high = len(self.recent) >= _LEAST and loss > self.factor * statistics.median(self.recent)
        if not math.isfinite(loss) or high:
            self.spikes += 1
            return True
        self.recent.append(loss)
        return False


def _global_loss(reduced: list[dict[str, Any]]) -> float:
    """Mean loss of the step over all microbatches and ranks; a collective. Tensor-parallel copies cancel out."""
    import torch

    from megatron_opt.kernels.host import current_device

    total = torch.zeros(2, dtype=torch.float64, device=current_device())
    for entry in reduced or []:  # filled on the last pipeline stage
        for value in entry.values():
            total += value.detach().double().view(-1)[:2]
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1]) if total[1] else math.nan


def _guarded_step(
    original: Callable[..., Any],
    watch: LossWatch,
    forward_step: Any,
    iterator: Any,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    config: Any,
    forward_backward: Callable[..., Any],
    **kwargs: Any,
) -> Any:
    """Megatron's train_step, whose update is left out when the loss is a spike."""
    from megatron.training import get_args

    args, iteration = get_args(), kwargs["iteration"] + 1
    spiked = False

    @functools.wraps(forward_backward)
    def watched(*positional: Any, **named: Any) -> Any:
        nonlocal spiked
        reduced = forward_backward(*positional, **named)
        loss = _global_loss(reduced)
        spiked = watch.spike(loss)
        if spiked:
            _report_spike(args, watch, iteration, loss)
        return reduced

    step = optimizer.step

    def update() -> Any:
        return (False, None, None) if spiked else step()

    optimizer.step = update
    try:
        return original(forward_step, iterator, model, optimizer, scheduler, config, watched, **kwargs)
    finally:
        optimizer.step = step


def _report_spike(args: Any, watch: LossWatch, iteration: int, loss: float) -> None:
    import torch

    rank = torch.distributed.get_rank()
    shown = loss if math.isfinite(loss) else str(loss)
    if args.on_loss_spike == "skip":
        if rank == 0:
            events.record("skip", iteration=iteration, loss=shown, count=watch.spikes)
        return
    target = rollback(Path(args.save), iteration, args.rollback_steps) if rank == 0 else None
    box = [target]
    torch.distributed.broadcast_object_list(box, src=0)
    target = box[0]
    if target is None:
        raise UserError(
            f"the loss of iteration {iteration} is {loss:.4g} and there is no checkpoint {args.rollback_steps} steps "
            "or more before it to go back to; lower --lr, or save more often."
        )
    if rank == 0:
        events.record("rollback", iteration=iteration, loss=shown, to=target, count=watch.spikes)
        print(
            f"megatron_opt: the loss of iteration {iteration} is {loss:.4g}: going back to iteration {target}; the "
            f"data of iterations {target + 1} to {iteration} will be skipped.",
            file=sys.stderr,
            flush=True,
        )
    torch.distributed.barrier()
    raise SystemExit(ROLLBACK_EXIT)


def rollback(save: Path, iteration: int, steps: int) -> int | None:
    """Make the newest checkpoint at least `steps` before `iteration` the newest of all, and note what to skip."""
    iterations = folders.iterations(save)
    target = next((n for n in iterations if n <= iteration - max(steps, 1)), None)
    if target is None:
        return None
    skip = sorted({*skipped_iterations(save), *range(target + 1, iteration + 1)})
    write_atomic(save / SKIP_FILE, json.dumps(skip))
    for newer in (n for n in iterations if n > target):
        folders.discard(save, newer)
    write_atomic(save / folders.TRACKER, str(target))
    folders.delete_discarded(save)
    return target


def skipped_iterations(save: Path) -> list[int]:
    """Iterations whose data earlier rollbacks of this run have given up."""
    path = save / SKIP_FILE
    if not path.is_file():
        return []
    try:
        return [int(n) for n in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no list of iterations ({error}); write the iterations whose data is skipped, or remove it to skip none."
        ) from error


# ---- hang


class HangWatch:
    """A thread that looks at the main thread's stack when the loop has stood still for `limit` seconds.

    Before the end of the first step it waits `first_limit` seconds: models, data and checkpoints may take their time.
    """

    def __init__(self, limit: float, first_limit: float) -> None:
        self.limit = limit
        self._first_limit = first_limit
        self._stepped = False
        self.iteration = 0
        self.moved = time.monotonic()
        self._main = threading.main_thread().ident
        self._store: Any = None

    def start(self) -> None:
        """Watch from now on."""
        threading.Thread(target=self._run, name="hang watch", daemon=True).start()

    def beat(self, iteration: int) -> None:
        """The loop has moved."""
        self.iteration, self.moved, self._stepped = iteration, time.monotonic(), True
        self._connect()

    def _connect(self) -> None:
        import torch

        if self._store is None and torch.distributed.is_initialized():
            # a client of its own: the shared one may be held by a collective that never returns
            self._store = torch.distributed.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(timedelta(seconds=5))

    def _still(self) -> float:
        """Seconds for which the loop has stood still, 0 below the limit."""
        still = time.monotonic() - self.moved
        return still if still > (self.limit if self._stepped else self._first_limit) else 0.0

    def _run(self) -> None:
        while True:
            time.sleep(min(1.0, self.limit / 10))
            if still := self._still():
                self._report(still)

    def _report(self, still: float) -> None:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        where = position(sys._current_frames()[self._main])  # type: ignore[index]
        mine = {"iteration": self.iteration, **where}
        reports = self._exchange(rank, world, mine)
        if rank == min(reports):
            verdict = judge(reports, world)
            events.record("hang", seconds=round(still, 1), **verdict)
            print(f"megatron_opt: no step for {still:.0f} s. {describe(verdict)}", file=sys.stderr, flush=True)
        if self.iteration == mine["iteration"] and self._still():
            os._exit(HANG_EXIT)

    def _exchange(self, rank: int, world: int, mine: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Reports by rank. The store lives in rank 0 or its agent: when that does not answer, rank 0 is silent."""
        prefix = f"megatron_opt/hang/{events.restarts()}/"
        reports = {rank: mine}
        try:
            self._connect()
            if self._store is None:  # the ranks have not met yet
                return reports
            self._store.set(f"{prefix}{rank}", json.dumps(mine))
            time.sleep(max(2.0, self.limit / 5))  # the others find out within a tick of each other
            for other in range(world):
                if self._store.check([f"{prefix}{other}"]):
                    reports[other] = json.loads(self._store.get(f"{prefix}{other}"))
        except (RuntimeError, ValueError):
            return {other: mine for other in range(1, world)} if rank else reports
        return reports


def position(frame: Any) -> dict[str, Any]:
    """{"collective": its name or None, "at": "file:line function"} of a thread.

    The collective is what was called in torch.distributed, or "wait" where an asynchronous one is waited for; the
    place is the innermost of Megatron's or ours, else the innermost outside torch.
    """
    collective, at, outside = None, None, None
    if frame.f_back is not None and frame.f_globals.get("__name__") == stragglers.__name__:  # times what is waited for
        frame = frame.f_back
    if ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
        collective = "wait"
    while frame is not None:
        name, module = frame.f_code.co_name, frame.f_globals.get("__name__", "")
        if module == "torch.distributed.distributed_c10d":
            collective = name.strip("_")  # the outermost is what was asked for
        elif not module.startswith(("torch.", __name__, stragglers.__name__)):
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}"
            outside = outside or where
            if at is None and module.startswith("megatron"):
                at = where
        frame = frame.f_back
    return {"collective": collective, "at": at or outside}


def judge(reports: dict[int, dict[str, Any]], world: int) -> dict[str, Any]:
    """Who holds the others up: ranks that do not answer, else those in no collective, else those behind."""
    silent = sorted(set(range(world)) - set(reports))
    busy = sorted(rank for rank, report in reports.items() if report["collective"] is None)
    least = min((report["iteration"] for report in reports.values()), default=0)
    behind = sorted(rank for rank, report in reports.items() if report["iteration"] == least)
    behind = behind if len(behind) < len(reports) else []
    guilty = silent or busy or behind
    others = (report for rank, report in sorted(reports.items()) if rank not in guilty)
    waiting = next((report for report in others if report["collective"]), None)
    return {
        "guilty": guilty,
        "silent": silent,
        "collective": waiting["collective"] if waiting else None,
        "at": waiting["at"] if waiting else None,
        "iteration": least + 1,
        "ranks": {str(rank): report for rank, report in sorted(reports.items())[:64]},
    }


def describe(verdict: dict[str, Any]) -> str:
    """One sentence for people."""
    names = ", ".join(map(str, verdict["guilty"])) or "unknown"
    how = "does not answer" if verdict["silent"] else "is in no collective or behind"
    waiting = f"; the others wait in {verdict['collective']} ({verdict['at']})" if verdict["collective"] else ""
    where = [
        f"rank {rank} at {report['at']}" for rank, report in verdict["ranks"].items() if int(rank) in verdict["guilty"]
    ]
    return f"Held up by rank {names}, which {how}{waiting}{': ' + '; '.join(where) if where else ''}."


def _watched_step_end(
    original: Callable[..., bool],
    watch: HangWatch,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    iteration: int,
    *args: Any,
    **kwargs: Any,
) -> bool:
    watch.beat(iteration)
    leaving = original(model, optimizer, scheduler, iteration, *args, **kwargs)
    watch.beat(iteration)
    return leaving
