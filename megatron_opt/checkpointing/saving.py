"""Megatron's save and load with checkpoints that are complete or invisible, verified, and retained by rule.

Megatron writes into `iter_N` in place and then rewrites its tracker; here it writes into `.saving/iter_N`, and
`folders.publish` makes that visible. What is inside a checkpoint stays Megatron's.
"""

import argparse
import functools
import gc
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt import patches
from megatron_opt.checkpointing import compared, folders, run_state
from megatron_opt.checkpointing.agreement import agree, each_anywhere, first_error, last_rank, rank
from megatron_opt.checkpointing.background import Writer
from megatron_opt.checkpointing.pending_save import PendingSave
from megatron_opt.checkpointing.snapshot import Request, Snapshots
from megatron_opt.checkpointing.verification import load_newest_sound
from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic
from megatron_opt.training import events

_SPARE = 1.02  # of the last checkpoint's size must be free before the next is begun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of retention, trust and failed saves."""
    group = parser.add_argument_group("megatron_opt checkpoints")
    group.add_argument(
        "--keep-last", type=int, default=0, metavar="N", help="keep the N newest checkpoints (default 0: all)"
    )
    group.add_argument(
        "--keep-every",
        type=int,
        default=0,
        metavar="N",
        help="with --keep-last, also keep checkpoints of iterations divisible by N",
    )
    group.add_argument(
        "--on-save-failure",
        choices=["stop", "continue"],
        default="stop",
        help="a checkpoint that cannot be written (disk full, read-only): end the run, or train on",
    )
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load a checkpoint although it has no checksums or its pickles import unknown names, "
        "which lets its author run code",
    )
    group.add_argument(
        "--accept-changed",
        nargs="+",
        default=[],
        metavar="FLAG",
        help="resume although these flags (norm-epsilon, seed …), which change the model or the place in the data, "
        "differ from the checkpoint's",
    )


def check(args: Any) -> None:
    """Refuse flags of saving that contradict each other, before anything is written."""
    if args.keep_every and not args.keep_last:
        raise UserError(f"--keep-every {args.keep_every} adds to --keep-last N; give that too.")
    if min(args.keep_last, args.keep_every) < 0:
        raise UserError("--keep-last and --keep-every want numbers from 0 on.")
    if args.keep_every and args.save_interval and args.keep_every % args.save_interval:
        raise UserError(
            f"--keep-every {args.keep_every} is not a multiple of --save-interval {args.save_interval}; change one of them."
        )
    if args.async_save and args.non_persistent_save_interval:
        raise UserError(
            "--non-persistent-save-interval does not work with --async-save; give a shorter --save-interval."
        )
    if getattr(args, "save_retain_interval", None) and args.keep_last:
        raise UserError("--save-retain-interval N is Megatron's word for --keep-last 1 --keep-every N; give one.")
    compared.check_accepted(args.accept_changed)


def install(args: Any) -> None:
    """Put save and load below into Megatron; call once, after its arguments are validated."""
    check(args)
    if getattr(args, "save_retain_interval", None):
        args.keep_last, args.keep_every, args.save_retain_interval = 1, args.save_retain_interval, None
    Saver(args).install()


class Saver:
    """Megatron's saving in this process, and what has become of each save."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.saving: str | None = None  # --save while Megatron prepares a checkpoint of `iteration`
        self.iteration = 0
        self.error: str | None = None  # what went wrong on this rank inside Megatron's writer
        self.started: dict[int, float] = {}  # when a save began, by iteration
        self.stalls: dict[int, float] = {}  # seconds for which a background save has held training up, by iteration
        self.announcements: list[Callable[[], None]] = []  # Weights & Biases, told of a checkpoint once it is published
        self.pending_save: PendingSave | None = None  # with --async-save
        self.snapshots = Snapshots()

    def install(self) -> None:
        """Put the methods below in the place of Megatron's functions."""
        args = self.args

        def wrap(target: str, make: Callable[[Any], Any]) -> None:
            patches.wrap(f"megatron.{target}", "checkpointing/saving.py", make)

        wrap("training.checkpointing.get_checkpoint_name", self._aside)
        wrap("training.checkpointing.get_checkpoint_tracker_filename", self._nowhere)
        wrap("training.wandb_utils.on_save_checkpoint_success", self._later)
        wrap("training.training.save_checkpoint", lambda save: functools.partial(self._save, save))
        wrap("training.training.load_checkpoint", lambda load: functools.partial(load_newest_sound, load))
        if args.async_save:
            writer = Writer(args.async_ckpt_cpu_priority)  # forks: threads and process groups come later
            self.pending_save = PendingSave(writer)
            self.snapshots.install(writer)
            wrap("training.checkpointing.schedule_async_save", lambda _: self._begin)
        else:  # Megatron's queue is a process of its own, which outlives a killed rank
            files = "core.dist_checkpointing.strategies.filesystem_async"
            wrap(f"{files}._results_queue", lambda _: queue.SimpleQueue())
            # rank 0 alone writes these two; were it to raise there, the others would wait for it
            wrap(f"{files}.FileSystemWriterAsync.finish", self._noted)
            wrap("core.dist_checkpointing.serialization.save_config", self._noted)
        wrap("training.training.maybe_finalize_async_save", lambda look: functools.partial(self._finalize, look))

    def _aside(self, original: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(original)
        def named(checkpoints_path: Any, *args: Any, **kwargs: Any) -> str:
            if self.saving is not None and checkpoints_path == self.saving:
                checkpoints_path = os.path.join(checkpoints_path, folders.STAGING)
            return original(checkpoints_path, *args, **kwargs)

        return named

    def _nowhere(self, original: Callable[..., str]) -> Callable[..., str]:
        """Megatron would write its tracker before the checkpoint is published: it writes into the void instead."""

        @functools.wraps(original)
        def named(checkpoints_path: Any) -> str:
            return (
                os.devnull
                if self.saving is not None and checkpoints_path == self.saving
                else original(checkpoints_path)
            )

        return named

    def _later(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def announce(checkpoint: str, tracker: str, save: str, iteration: int) -> None:
            published = os.path.join(save, folders.name_of(iteration))
            self.announcements.append(lambda: original(published, os.path.join(save, folders.TRACKER), save, iteration))

        return announce

    def _noted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
                self.error = str(error)

        return noted

    def _begin(self, request: Any) -> None:
        """In place of Megatron's `schedule_async_save`."""
        from megatron.training import get_args

        flags = get_args()
        if not isinstance(request, Request):  # something else to be done in the background
            request.execute_sync()
            return
        assert self.pending_save is not None and self.saving is not None
        notes = {run_state.FILE: run_state.current()} if last_rank() else {}
        self.pending_save.begin(request, notes, Path(self.saving), self.iteration, flags.keep_last, flags.keep_every)

    def _save(self, original: Callable[..., Any], iteration: int, *args: Any, **kwargs: Any) -> None:
        """Save aside, digest, publish, prune; a failure ends or is passed over as --on-save-failure says."""
        from megatron.core.dist_checkpointing.mapping import CheckpointingException
        from megatron.training import get_args
        from torch.distributed.checkpoint.api import CheckpointException

        flags = get_args()
        if kwargs.get("non_persistent_ckpt") or kwargs.get("release"):
            original(iteration, *args, **kwargs)
            return
        save = Path(flags.save)
        began = time.monotonic()
        self._conclude(flags, blocking=True)
        trouble = self._prepare(save, iteration) if rank() == 0 else None
        repeatable = self.pending_save is not None and self.snapshots.repeatable(args[1])
        troubled, new = each_anywhere(trouble is not None, not repeatable)
        if troubled:
            self._failed(flags, iteration, agree(trouble))
            return
        if self.pending_save is not None:
            self.snapshots.prepare(args[0], args[1], repeat=not new)
            args[1].settle_copies = self.pending_save.writer.settle
        self.saving, self.iteration, self.error = flags.save, iteration, None
        self.started[iteration] = began
        constant, flags.ckpt_assume_constant_structure = flags.ckpt_assume_constant_structure, flags.async_save
        collecting = gc.isenabled()
        gc.disable()  # a collection in between takes as long as the whole of a background save's preparation
        try:
            original(iteration, *args, **kwargs)
        except (CheckpointException, CheckpointingException) as error:
            if isinstance(error, CheckpointingException) and not hasattr(error, "of_all_ranks"):
                raise  # the others are elsewhere; torch's own is raised on every rank
            self.error = _short(error)
        finally:
            self.saving = None
            self.snapshots.done()
            flags.ckpt_assume_constant_structure = constant
            if collecting:
                gc.enable()
        if flags.async_save and self.error is None:
            self.stalls[iteration] = time.monotonic() - began
            return
        if self.error is None:
            try:
                folder = save / folders.STAGING / folders.name_of(iteration)
                if last_rank():
                    write_atomic(folder / run_state.FILE, run_state.current())
                folders.sum_files(folder, rank())
            except OSError as error:
                self.error = str(error)
        self._publish(flags, save, iteration)

    def _prepare(self, save: Path, iteration: int) -> str | None:
        """Rank 0, before anything is written: an empty folder aside and room for as much as last time, or what is wrong."""
        folder = save / folders.STAGING / folders.name_of(iteration)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / ".probe").write_bytes(b"\0" * 4096)
            (folder / ".probe").unlink()
            newest = folders.iterations(save)[:1]
            wanted = (
                sum(path.stat().st_size for path in (save / folders.name_of(newest[0])).rglob("*")) if newest else 0
            )
            free = shutil.disk_usage(save).free
        except OSError as error:
            return f"{error.strerror or error} ({save})"
        if free < wanted * _SPARE:
            return f"{free / 1e6:,.0f} MB are free under {save}, the last checkpoint took {wanted / 1e6:,.0f} MB"
        return None

    def _publish(self, flags: Any, save: Path, iteration: int) -> None:
        """Collective: every rank's error is known before rank 0 publishes."""
        trouble, self.error = first_error(self.error), None
        if trouble is None:
            trouble = agree(self._publish_on_rank_0(flags, save, iteration) if rank() == 0 else None)
        self._tell(flags, iteration, trouble)

    def _conclude(self, flags: Any, blocking: bool, since: float | None = None) -> None:
        """Collective: hear how the background save ended; the time `since` then is its stall."""
        ended = self.pending_save.look(blocking) if self.pending_save is not None else None
        if since is not None:
            seconds = time.monotonic() - since + self.snapshots.waited()
            for iteration in self.stalls:
                self.stalls[iteration] += seconds
        if ended is None:
            return
        if ended.trouble is None:
            for announce in ended.announcements:
                announce()
            if rank() == 0:
                self._record(ended.iteration, ended.size, ended.pruned)
        self._tell(flags, ended.iteration, ended.trouble)

    def _publish_on_rank_0(self, flags: Any, save: Path, iteration: int) -> str | None:
        try:
            size = folders.publish(save, iteration)
        except OSError as error:
            return f"{error.strerror or error} ({error.filename or save})"
        self._record(iteration, size, folders.prune(save, flags.keep_last, flags.keep_every))
        threading.Thread(target=folders.delete_discarded, args=(save,)).start()
        return None

    def _record(self, iteration: int, size: int, pruned: list[int]) -> None:
        seconds = time.monotonic() - self.started.pop(iteration, time.monotonic())
        stall = {"stall_seconds": round(self.stalls[iteration], 4)} if iteration in self.stalls else {}
        events.record("save", iteration=iteration, seconds=round(seconds, 3), bytes=size, **stall)
        if pruned:
            events.record("prune", iterations=pruned)

    def _tell(self, flags: Any, iteration: int, trouble: str | None) -> None:
        ready = list(self.announcements)
        self.announcements.clear()
        self.started.pop(iteration, None)
        self.stalls.pop(iteration, None)
        if trouble:
            self._failed(flags, iteration, trouble)
            return
        for announce in ready:
            announce()

    def _failed(self, flags: Any, iteration: int, trouble: str) -> None:
        """Every rank: what is half written goes, earlier checkpoints stay."""
        if rank() == 0:
            shutil.rmtree(Path(flags.save) / folders.STAGING / folders.name_of(iteration), ignore_errors=True)
            newest = folders.iterations(Path(flags.save))[:1]
            kept = f"the newest whole one is of iteration {newest[0]}" if newest else "there is none yet"
            events.record("save_failed", iteration=iteration, reason=trouble)
            print(
                f"megatron_opt: the checkpoint of iteration {iteration} was not saved: {trouble}; {kept}.",
                file=sys.stderr,
                flush=True,
            )
        if flags.on_save_failure == "stop":
            raise UserError(
                f"the checkpoint of iteration {iteration} could not be saved ({trouble}); make room and start "
                "the same command again, or train on without it by --on-save-failure continue."
            )

    def _finalize(self, original: Callable[..., None], blocking: bool = False, **kwargs: Any) -> None:
        """Megatron's look at running asynchronous saves, at every step."""
        from megatron.training import get_args

        began = time.monotonic()
        original(blocking=blocking, **kwargs)
        self._conclude(get_args(), blocking, began)


def _short(error: BaseException) -> str:
    """The innermost cause in one line; torch wraps it together with its stack."""
    failures = getattr(error, "failures", None) or {}
    for cause in failures.values():
        cause = cause[0] if isinstance(cause, tuple) else cause
        return " ".join(str(cause).split())
    return " ".join(str(error).split())[:300]
