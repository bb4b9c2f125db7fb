"""Checkpoints through Megatron's own saving and loading, looked at first so that what cannot be loaded is said in a sentence."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt import patches
from megatron_opt.checkpointing import agreement, compared, folders, other_layers, trusted
from megatron_opt.distributed.state import FORMAT, contents
from megatron_opt.errors import UserError
from megatron_opt.training import console

_WITH_MODEL = ("seq_length", "max_position_embeddings", "hidden_dropout", "attention_dropout")
_SHARDING = "distrib_optim_sharding_type"


def install(ours: bool = True) -> None:
    """Put our look before Megatron's `load_checkpoint`; call before `saving.install`, which chooses the folder.

    `ours` says whether the optimizer is this project's.
    """
    file = "checkpointing/resuming.py"
    patches.wrap("megatron.training.training.load_checkpoint", file, lambda load: functools.partial(_load, load, ours))
    other_layers.install()
    for module in ("strategies.fully_parallel", "state_dict_utils", "validation"):  # which the others take it from
        name = f"megatron.core.dist_checkpointing.{module}.validate_sharding_integrity"
        patches.wrap(name, file, agreement.refused_by_all)
    if not ours:
        return
    patches.wrap("megatron.training.checkpointing._build_sharded_state_dict_metadata", file, _for_any_layout)


def _for_any_layout(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Megatron allows another layout only to one type of state; ours is stored by whole-matrix coordinates."""

    @functools.wraps(original)
    def metadata(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(*args, **kwargs) | {_SHARDING: "fully_reshardable"}

    return metadata


def _load(
    original: Callable[..., Any], ours: bool, model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any
) -> Any:
    from megatron.training import get_args

    options = get_args()
    folder = newest(options)
    foreign = None
    # Megatron's optimizers may be stored in other formats, and a model alone has nothing to be resumed
    if folder is not None and optimizer is not None and (ours or (folder / "metadata.json").is_file()):
        foreign = _examine(folder, ours, optimizer, options)
    if foreign:
        options.no_load_optim = True
    if ours and options.fp8_param_gather:
        options.load_main_params_from_ckpt = True  # else Megatron keeps the values from our `reload_model_params`
    try:
        loaded = original(model, optimizer, scheduler, *args, **kwargs)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if schedule := re.search(
            r"class input value (\S+) and checkpoint ?value (\S+) for (.+?) do not match", str(error)
        ):
            here, there, what = schedule.groups()
            what += " (in samples)" if "iterations" in what else ""
            raise UserError(
                f"the checkpoint {folder} has another schedule: its {what} is {there}, this run's {here}, by "
                "--train-iters, --lr, --lr-… and --weight-decay; give the same, --override-opt_param-scheduler for this run's, "
                "or --use-checkpoint-opt_param-scheduler for its own."
            ) from error
        raise UserError(
            f"the checkpoint {folder} cannot be loaded: {_short(error)}; resume from an earlier one (--ckpt-step N)."
        ) from error
    if foreign:
        if scheduler is not None and not options.finetune:
            scheduler.step(increment=options.consumed_train_samples)
        if options.rank == 0:
            console.say(f"{folder}: {foreign}; the model is loaded and the optimizer's state starts anew")
    if folder is not None and scheduler is not None:
        scheduler.step(
            increment=0
        )  # Megatron's load sets rates and decay before it takes the checkpoint's weight decay
    return loaded


def _short(error: BaseException) -> str:
    failures = getattr(error, "failures", None)  # torch's CheckpointException: rank -> (error, traceback)
    if failures:
        error = next(iter(failures.values()))[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def newest(options: Any) -> Path | None:
    """The folder that Megatron will load, or None where there is no checkpoint yet."""
    if options.load is None:
        return None
    if getattr(options, "ckpt_step", None):
        return _existing(Path(options.load) / folders.name_of(options.ckpt_step), "--ckpt-step")
    tracker = Path(options.load) / folders.TRACKER
    if trouble := folders.nonsense(Path(options.load)):
        raise UserError(f"--load {options.load}: {trouble}.")
    text = folders.tracked(Path(options.load))
    if text is None:
        return None
    return _existing(
        Path(options.load) / ("release" if text == "release" else folders.name_of(int(text))), str(tracker)
    )


def _existing(folder: Path, named_by: str) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"{named_by} names the checkpoint {folder}, which is not there; name one that is (--ckpt-step N)."
        )
    return folder


def take_flags(args: Any, given: set[str]) -> None:
    """--use-checkpoint-args: the checkpoint's model and sequence length, but for the flags in `given`; before they are checked.

    Megatron has this in a parsing of its own, which a preset and CPU defaults cannot go through.
    """
    from megatron.core import dist_checkpointing

    folder = newest(args)
    if folder is None:
        raise UserError("--use-checkpoint-args takes flags from a checkpoint; --load names no folder that has one.")
    if not args.trust_checkpoint and (refused := trusted.refusal(folder)):
        raise UserError(f"the flags of {folder} cannot be taken: {refused}.")
    check_files(folder)
    saved = dist_checkpointing.load_common_state_dict(str(folder)).get("args")
    if saved is None:
        raise UserError(f"the checkpoint {folder} records no flags; give the model's instead of --use-checkpoint-args.")
    tokenizer = ("tokenizer_type", "tokenizer_model") if args.use_tokenizer_model_from_checkpoint_args else ()
    for name in (*compared.FUNCTION, *_WITH_MODEL, *tokenizer):
        expert = name == "moe_ffn_hidden_size" and not getattr(saved, "num_experts", None)
        if hasattr(saved, name) and hasattr(args, name) and compared.option(name) not in given and not expert:
            setattr(args, name, getattr(saved, name))


def _examine(folder: Path, ours: bool, optimizer: Any, options: Any) -> str | None:
    """Refuse damaged checkpoints and those of other models; a reason where the optimizer's state is not ours, or None."""
    from megatron.core import dist_checkpointing

    check_files(folder)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
    except BaseException as error:
        raise UserError(
            f"the checkpoint {folder} is damaged: {_short(error)}; resume from an earlier one (--ckpt-step N)."
        ) from error
    saved = common.get("args")
    if saved is not None:
        compared.check(folder, saved, options)
    if not ours or options.no_load_optim or options.finetune:
        return None
    state = common.get("optimizer")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        if not state:
            return "it has no optimizer state"
        if isinstance(state, dict) and "format" in state:
            return f"its optimizer state is in the format {state['format']}, not {FORMAT}"
        return f"its optimizer state was written by Megatron's {getattr(saved, 'optimizer', None) or 'optimizer'}"
    if state["contents"] != contents(optimizer):
        theirs = "+".join(state["optimizers"])
        here = "+".join(sorted({group.optimizer for group in optimizer.groups}))
        raise UserError(
            f"the checkpoint {folder} holds the state of {theirs} with other parameter groups or options than this run "
            f"({here}); give the same optimizer flags, or --no-load-optim to start its state anew."
        )
    if optimizer.average is not None:
        optimizer.average.stored = bool(state.get("averaged"))
    if bool(getattr(saved, "bf16", False)) != bool(options.bf16):
        kinds = {True: "bf16", False: "fp32"}
        raise UserError(
            f"the checkpoint {folder} was trained in {kinds[bool(saved.bf16)]}, this run is in {kinds[bool(options.bf16)]}; "
            "use the same, or --no-load-optim to take the weights alone."
        )
    return None


def check_files(folder: Path) -> None:
    """Refuse a torch_dist checkpoint with missing or shortened files."""
    from torch.distributed.checkpoint import FileSystemReader

    if not (folder / "metadata.json").is_file() or not (folder / ".metadata").is_file():
        raise UserError(
            f"the checkpoint {folder} is not whole (metadata.json or .metadata is missing: was saving cut short?); "
            "resume from an earlier one (--ckpt-step N)."
        )
    try:
        storage = FileSystemReader(folder).read_metadata().storage_data
    except Exception as error:
        raise UserError(
            f"the checkpoint {folder} is damaged: .metadata cannot be read; resume from an earlier one (--ckpt-step N)."
        ) from error
    ends: dict[str, int] = {}
    for info in storage.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            what = "is missing" if size < 0 else f"has {size} of {end} bytes"
            raise UserError(
                f"the checkpoint {folder} is damaged: {name} {what}; resume from an earlier one (--ckpt-step N)."
            )
