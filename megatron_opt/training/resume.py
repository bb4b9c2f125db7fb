"""Checkpoints through Megatron's own saving and loading, looked at first so that what cannot be loaded is said in a sentence."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opt.distributed.state import FORMAT, contents
from megatron_opt.errors import UserError
from megatron_opt.training import console, folders

# what makes two models the same; a value that a checkpoint does not record is not compared
_MODEL = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_experts "
    "moe_ffn_hidden_size moe_shared_expert_intermediate_size position_embedding_type normalization swiglu "
    "add_bias_linear untie_embeddings_and_output_weights multi_latent_attention attention_output_gate"
).split()
_SHARDING = "distrib_optim_sharding_type"


def install() -> None:
    """Put our look before Megatron's `load_checkpoint`; call before `checkpoints.install`, which chooses the folder."""
    from megatron.training import checkpointing, training

    training.load_checkpoint = functools.partial(_load, training.load_checkpoint)
    checkpointing._build_sharded_state_dict_metadata = _for_any_layout(checkpointing._build_sharded_state_dict_metadata)


def _for_any_layout(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Megatron allows another layout only to one type of state; ours is stored by whole-matrix coordinates."""

    @functools.wraps(original)
    def metadata(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return original(*args, **kwargs) | {_SHARDING: "fully_reshardable"}

    return metadata


def _load(original: Callable[..., Any], model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    from megatron.training import get_args

    options = get_args()
    folder = newest(options)
    foreign = None
    if folder is not None and optimizer is not None:
        foreign = _examine(folder, optimizer, options)
    if foreign:
        options.no_load_optim = True
    try:
        found = original(model, optimizer, scheduler, *args, **kwargs)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        remedy = "resume from an earlier one (--ckpt-step N)"
        if "OptimizerParamScheduler" in str(error):
            remedy = (
                "--override-opt_param-scheduler takes the flags' schedule, --use-checkpoint-opt_param-scheduler its own"
            )
        raise UserError(f"the checkpoint {folder} cannot be loaded: {_short(error)}; {remedy}.") from error
    if foreign:
        if scheduler is not None and not options.finetune:
            scheduler.step(increment=options.consumed_train_samples)
        if options.rank == 0:
            console.say(f"{folder}: {foreign}; the model is loaded and the optimizer's state starts anew")
    return found


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
    tracker = Path(options.load) / folders.TRACKER
    if getattr(options, "ckpt_step", None):
        return _existing(Path(options.load) / folders.name_of(options.ckpt_step), "--ckpt-step")
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text != "release" and not text.isdigit():
        raise UserError(
            f"{tracker} holds {text[:40]!r} in place of an iteration number; write the number of a whole checkpoint into it."
        )
    return _existing(
        Path(options.load) / ("release" if text == "release" else folders.name_of(int(text))), str(tracker)
    )


def _existing(folder: Path, named_by: str) -> Path:
    if not folder.is_dir():
        raise UserError(
            f"{named_by} names the checkpoint {folder}, which is not there; name one that is (--ckpt-step N)."
        )
    return folder


def _examine(folder: Path, optimizer: Any, options: Any) -> str | None:
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
        _compare_models(folder, saved, options)
    if options.no_load_optim or options.finetune:
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
        ours = "+".join(sorted({group.optimizer for group in optimizer.groups}))
        raise UserError(
            f"the checkpoint {folder} holds the state of {theirs} with other parameter groups or options than this run "
            f"({ours}); give the same optimizer flags, or --no-load-optim to start its state anew."
        )
    if bool(getattr(saved, "bf16", False)) != bool(options.bf16):
        kinds = {True: "bf16", False: "fp32"}
        raise UserError(
            f"the checkpoint {folder} was trained in {kinds[bool(saved.bf16)]}, this run is in {kinds[bool(options.bf16)]}; "
            "use the same, or --no-load-optim to take the weights alone."
        )
    return None


def _compare_models(folder: Path, saved: Any, options: Any) -> None:
    for name in _MODEL:
        if not hasattr(saved, name):
            continue
        theirs, ours = _model_value(saved, name), _model_value(options, name)
        if theirs != ours:
            raise UserError(
                f"the checkpoint {folder} is of another model: its --{name.replace('_', '-')} is {theirs}, this run's is "
                f"{ours}; give the same model flags."
            )


def _model_value(args: Any, name: str) -> Any:
    if name == "num_query_groups" and not getattr(args, "group_query_attention", False):
        return args.num_attention_heads  # Megatron leaves 1 or the number of heads there
    return getattr(args, name, None)


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
