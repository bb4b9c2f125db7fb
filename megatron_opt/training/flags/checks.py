"""What a command line must say before Megatron is asked: no flag without effect, no number out of range, nothing missing."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opt import platform, presets
from megatron_opt.checkpointing import folders
from megatron_opt.errors import UserError
from megatron_opt.training.flags import conditions, fp8, layout, ranges, table, tokenizers

_NEEDED = (
    ("num_layers", "--num-layers"),
    ("hidden_size", "--hidden-size"),
    ("num_attention_heads", "--num-attention-heads"),
    ("seq_length", "--seq-length"),
)


def before(args: Any, actions: Sequence[argparse.Action], given: set[str]) -> None:
    """Refuse flags and values that no run on this machine can mean; `given`: also by presets and defaults of ours."""
    _check_empty(actions, args, given)
    ranges.check_ranges(args, actions)
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN

    table.check_flags(
        args,
        actions,
        given,
        cpu=platform.on_cpu(),
        engine=platform.can_fp8(),
        ours=args.optimizer not in MEGATRON_OWN,
    )
    conditions.check_needs(args, args.given_flags)


def _check_empty(actions: Sequence[argparse.Action], args: Any, given: set[str]) -> None:
    """Refuse a flag that takes any number of words and got none."""
    for action in actions:
        value = getattr(args, action.dest, None)
        names = [name.removeprefix("--") for name in action.option_strings]
        if value in ([], "") and given.intersection(names) and value != action.default:
            raise UserError(f"--{names[0]} is given without a value; give one, or leave the flag out.")


def model_and_layout(args: Any) -> None:
    """Refusals that Megatron would make late, unclearly or not at all; fills in what it refuses to guess."""
    for name, flag in _NEEDED:
        if getattr(args, name) is None and not (name == "num_layers" and args.hybrid_layer_pattern):
            known = ", ".join(presets.names())
            if args.use_checkpoint_args:
                raise UserError(f"{flag} is missing, and the checkpoint of --load records none; give it.")
            from_checkpoint = ", or --use-checkpoint-args with --load" if args.load else ""
            raise UserError(f"{flag} is missing; give it, or a whole model by --preset ({known}){from_checkpoint}.")
    if args.micro_batch_size is None:
        raise UserError("--micro-batch-size is missing; give the number of sequences in one pass of one rank.")
    if args.lr is None and not args.plan_world_size:
        raise UserError("--lr is missing; give the learning rate, which depends on the optimizer.")
    from megatron_opt.training import faults

    _check_length(args)
    conditions.check_schedule(args)
    if args.fp16 and args.optimizer not in ("adam", "sgd"):
        raise UserError(f"--fp16 does not work with --optimizer {args.optimizer}; use --bf16 or fp32.")
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 are two types; give one.")
    if args.swiglu + args.squared_relu + args.quick_geglu > 1:
        raise UserError("--swiglu, --squared-relu and --quick-geglu are three activations; give one.")
    if args.transformer_impl == "transformer_engine" and not platform.can_fp8():
        raise UserError(
            "--transformer-impl transformer_engine needs Transformer Engine, which is not installed; install it (extra "
            "`gpu`) or give --transformer-impl local."
        )
    if platform.on_cpu() and args.distributed_backend == "nccl":
        raise UserError("--distributed-backend nccl needs GPUs; leave it out on CPU, where ranks talk by gloo.")
    fp8.check_recipe(args)
    _check_logits(args)
    layout.check_layout(args)
    faults.check(args)
    tokenizers.check_tokenizer(args)
    _check_saving(args)
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.max_position_embeddings < args.seq_length:
        raise UserError(
            f"--max-position-embeddings {args.max_position_embeddings} is below --seq-length {args.seq_length}; raise it."
        )


def _check_logits(args: Any) -> None:
    from megatron_opt.distributed import qk_clip
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN

    qk_clip.check(args)
    for flag in ("qk_clip", "log_max_attention_logit"):
        if getattr(args, flag) and args.optimizer in MEGATRON_OWN:
            raise UserError(
                f"--{flag.replace('_', '-')} with --optimizer {args.optimizer} would be Megatron's own, which knows nothing of "
                "sharded main copies; give an optimizer of this project, such as adamw."
            )


def trainable(args: Any) -> None:
    """Refuse models that can be planned on CPU but not trained there."""
    if platform.on_cpu() and "M" in (args.hybrid_layer_pattern or ""):
        raise UserError(
            f"--hybrid-layer-pattern {args.hybrid_layer_pattern}: Mamba layers (M) have kernels for GPUs alone; leave them "
            "out on CPU."
        )


def _check_length(args: Any) -> None:
    if args.train_iters is not None and args.train_samples is not None:
        raise UserError("--train-iters and --train-samples both say how long the run is; give one.")
    unit, other = ("samples", "iters") if args.train_samples is not None else ("iters", "samples")
    length = getattr(args, f"train_{unit}")
    if not length and not args.skip_train:
        raise UserError("--train-iters is missing; give the number of steps (or --train-samples).")
    for name in (f"lr_warmup_{other}", f"lr_decay_{other}", f"lr_wsd_decay_{other}"):
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} does not go with --train-{unit}; give --{flag.replace(other, unit)}.")
    if args.lr_warmup_fraction is not None and getattr(args, f"lr_warmup_{unit}"):
        raise UserError(f"--lr-warmup-fraction and --lr-warmup-{unit} both say how long the warm-up is; give one.")
    warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}") or length
    if warmup and decay and warmup >= decay:
        raise UserError(f"--lr-warmup-{unit} {warmup} is not below the {decay} {unit} of the schedule; lower it.")
    final = getattr(args, f"lr_wsd_decay_{unit}")
    if final and decay and final > decay:
        raise UserError(f"--lr-wsd-decay-{unit} {final} is above the {decay} {unit} of the schedule; lower it.")
    if args.eval_interval is None:
        if not _evaluates(args):
            args.eval_iters = 0  # Megatron's 100 at the end, of which nobody has spoken
        if args.eval_iters and not args.skip_train:
            raise UserError(
                "--eval-interval is missing; give the steps between evaluations, or --eval-iters 0 for none."
            )
        args.eval_interval = max(1, length or 1)
    if args.step_batch_size_schedule is not None and args.global_batch_size is not None:
        raise UserError("--step-batch-size-schedule and --global-batch-size both give the batch; give one.")
    if args.log_memory_interval and args.log_memory_interval % args.log_interval:
        raise UserError(
            f"--log-memory-interval {args.log_memory_interval} is not a multiple of --log-interval {args.log_interval}."
        )


def _evaluates(args: Any) -> bool:
    """Whether flags speak of evaluation, or of data for it."""
    asked = {"eval-iters", "eval-samples", "full-validation", "skip-train"} & args.given_flags
    data = (args.valid_data_path, args.data_path, args.data_args_path, args.per_split_data_args_path)
    return bool(asked) or args.preset is not None or any(path is not None for path in data)


def _check_saving(args: Any) -> None:
    from megatron_opt.checkpointing import saving

    if args.async_save:
        if args.async_strategy == "nvrx" and "async-strategy" in args.given_flags:
            raise UserError(
                "--async-strategy nvrx: background saves have a writer of this project's own; leave it out."
            )
        args.async_strategy, args.use_persistent_ckpt_worker = "mcore", True  # else Megatron would save synchronously
        if args.world_size == args.tensor_model_parallel_size * args.pipeline_model_parallel_size:
            args.ckpt_fully_parallel_save = False  # nobody to share the writing with
    if args.save and args.save_interval is None:
        args.save_interval = args.train_iters or 1000  # Megatron refuses to guess; ours is the end of the run
    saving.check(args)
    for flag, folder in _folders(args):
        _check_folder(flag, folder)
    if args.data_cache_path is not None and not os.path.isdir(
        args.data_cache_path
    ):  # one that is there may be read-only
        _check_folder("--data-cache-path", args.data_cache_path)
    if args.save and args.save_retain_interval and args.save_retain_interval % args.save_interval:
        raise UserError(
            f"--save-retain-interval {args.save_retain_interval} is not a multiple of --save-interval {args.save_interval}."
        )
    for flag, folder in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        _check_source(args, flag, folder)


def _check_source(args: Any, flag: str, folder: str | None) -> None:
    """Refuse to start anew where a checkpoint was named; the folder that is saved to may be empty yet."""
    named = args.ckpt_step is not None and flag == "--load" and not args.exit_on_missing_checkpoint
    if folder is None or named:  # --ckpt-step's checkpoint is looked for when it is loaded
        return
    if not os.path.isdir(folder) and (folder != args.save or args.exit_on_missing_checkpoint or os.path.exists(folder)):
        raise UserError(f"{flag} {folder} is no folder; name one that holds checkpoints.")
    if folder == args.save or folders.holds_one(Path(folder)):
        return
    above, iteration = os.path.dirname(os.path.abspath(folder)), re.fullmatch(r"iter_0*(\d+)", os.path.basename(folder))
    if iteration:
        raise UserError(f"{flag} {folder} is one checkpoint; give --load {above} --ckpt-step {iteration[1]}.")
    raise UserError(
        f"{flag} {folder} holds no checkpoint (neither {folders.TRACKER} nor {folders.name_of(100)} or its like); name a "
        "folder that does, or the one of --save to start anew and resume from it later."
    )


def make_folders(args: Any) -> None:
    """Make the folders that the run writes to, when every flag has been found good."""
    for flag, folder in _folders(args):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {folder} cannot be made ({error.strerror}); name another folder.") from error


def _folders(args: Any) -> list[tuple[str, str]]:
    flags = (
        ("--save", args.save),
        ("--output-dir", args.output_dir),
        ("--tensorboard-dir", args.tensorboard_dir),
        ("--wandb-save-dir", args.wandb_save_dir or None),
    )
    return [(flag, folder) for flag, folder in flags if folder is not None]


def _check_folder(flag: str, folder: str) -> None:
    """Refuse a folder that is a file, or that this user may not write to."""
    if not folder:
        raise UserError(f"{flag} is an empty word; name a folder.")
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise UserError(f"{flag} {folder}: {above} is a file; name a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: {above} cannot be written to by this user; name another folder.")
