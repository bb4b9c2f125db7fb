"""Which checkpoint to resume from: the newest that is whole and harmless, verified by all ranks together."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt.checkpointing import folders, run_state, trusted
from megatron_opt.checkpointing.agreement import agree, first_error, rank
from megatron_opt.errors import UserError
from megatron_opt.training import events


def load_newest_sound(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Load the newest checkpoint that is whole, saying which ones are not."""
    from megatron.training import get_args

    flags = get_args()
    load = getattr(flags, kwargs.get("load_arg", "load"))
    if flags.save and rank() == 0:
        folders.delete_discarded(Path(flags.save), staging=True)
    if load is None or kwargs.get("load_arg", "load") != "load":
        return original(*args, **kwargs)
    wanted = getattr(flags, "ckpt_step", None)
    chosen = _choose(Path(load), wanted, flags.trust_checkpoint, own=load == flags.save)
    if chosen is None:
        return original(*args, **kwargs)
    began = time.monotonic()
    flags.ckpt_step = chosen
    try:
        with trusted.checked_extra_state():
            loaded = original(*args, **kwargs)
    finally:
        flags.ckpt_step = wanted
    if not flags.finetune:
        run_state.restore(Path(load) / folders.name_of(chosen))
    if rank() == 0:
        events.record(
            "resume",
            iteration=loaded[0],
            seconds=round(time.monotonic() - began, 3),
            consumed_samples=flags.consumed_train_samples,
            world_size=flags.world_size,
        )
    return loaded


def _choose(load: Path, wanted: int | None, trust: bool, own: bool) -> int | None:
    """The newest sound iteration, agreed by all ranks; None leaves the matter to Megatron (nothing there, release)."""
    import torch

    candidates, unusable = agree(_candidates(load, wanted) if rank() == 0 else None)
    if unusable:
        raise UserError(unusable)
    refusals: list[str] = []
    damaged: list[int] = []
    for iteration in candidates:
        files, trouble = agree(_inspect(load, iteration, trust) if rank() == 0 else None)
        if trouble is None and files:
            share, shares = rank(), torch.distributed.get_world_size()
            trouble = folders.damage(load / folders.name_of(iteration), files, share, shares)
        trouble = first_error(trouble)
        if trouble is None:
            if rank() == 0 and own:
                for number in damaged:  # else retention would count them
                    folders.set_apart(load, number)
            return int(iteration)
        if folders.MISMATCH in trouble:
            damaged.append(iteration)
        refusals.append(f"iteration {iteration} ({trouble})")
        if rank() == 0:
            events.record("damaged", iteration=iteration, reason=trouble)
            print(
                f"megatron_opt: the checkpoint of iteration {iteration} under {load} is not used: {trouble}.",
                file=sys.stderr,
                flush=True,
            )
    if refusals:
        raise UserError(
            f"no checkpoint under {load} can be used: {'; '.join(refusals[:3])}; repair or remove them, "
            "or load a foreign one that you trust by --trust-checkpoint."
        )
    return None


def _candidates(load: Path, wanted: int | None) -> tuple[list[int], str | None]:
    """Rank 0: (iterations to try, why the folder cannot be used)."""
    try:
        if trouble := folders.nonsense(load):
            return [], f"--load {load}: {trouble}."
        if wanted:
            return [wanted], None
        return [] if folders.tracked(load) == "release" else folders.iterations(load), None
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        return [], f"--load {load} cannot be read ({why}); let this user read it, or name another folder."


def _inspect(load: Path, iteration: int, trust: bool) -> tuple[dict[str, str] | None, str | None]:
    """Rank 0: (digests by file, what forbids this checkpoint)."""
    folder = load / folders.name_of(iteration)
    try:
        if not folder.is_dir():
            return None, f"there is no {folder.name}"
        files = folders.manifest(load, iteration)
    except (OSError, ValueError) as error:
        return None, f"its {folders.MANIFEST} is unreadable ({error})"
    if (
        files is None
        and not any((folder / name).exists() for name in (".metadata", "common.pt"))
        and not list(folder.glob("mp_rank_*"))
    ):
        return None, "it is incomplete"
    if trust:
        return files, None
    if files is None:
        return None, f"it has no {folders.MANIFEST}, so that its origin and wholeness are unknown"
    small = {name: digest for name, digest in files.items() if not name.endswith(".distcp")}
    if trouble := folders.damage(folder, small):
        return None, trouble
    try:
        refused = trusted.refusal(folder)
    except OSError as error:
        return None, f"{error.filename}: {error.strerror}"
    return (None, refused) if refused else (files, None)
