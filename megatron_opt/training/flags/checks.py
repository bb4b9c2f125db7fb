"""What a command line must say before Megatron is asked: no flag without effect, no number out of range, nothing missing."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from megatron_opt import platform, presets
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


def model_and_layout(args: Any) -> None:
    """Refusals that Megatron would make late, unclearly or not at all; fills in what it refuses to guess."""
    for name, flag in _NEEDED:
        if getattr(args, name) is None and not (name == "num_layers" and args.hybrid_layer_pattern):
            known = ", ".join(presets.names())
            from_checkpoint = ", or --use-checkpoint-args with --load" if args.load else ""
            raise UserError(f"{flag} is missing; give it, or a whole model by --preset ({known}){from_checkpoint}.")
    if args.micro_batch_size is None:
        raise UserError("--micro-batch-size is missing; give the number of sequences in one pass of one rank.")
    if args.lr is None and not args.plan_world_size:
        raise UserError("--lr is missing; give the learning rate, which depends on the optimizer.")
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
    fp8.check_recipe(args)
    layout.check_layout(args)
    tokenizers.check_tokenizer(args)
    _check_saving(args)
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    if args.max_position_embeddings < args.seq_length:
        raise UserError(
            f"--max-position-embeddings {args.max_position_embeddings} is below --seq-length {args.seq_length}; raise it."
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


def _check_saving(args: Any) -> None:
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
    for flag, folder in _folders(args):
        _check_folder(flag, folder)
    if args.save and args.save_retain_interval and args.save_retain_interval % args.save_interval:
        raise UserError(
            f"--save-retain-interval {args.save_retain_interval} is not a multiple of --save-interval {args.save_interval}."
        )
    if args.load and not os.path.isdir(args.load) and args.exit_on_missing_checkpoint:
        raise UserError(f"--load {args.load} is no folder; name one that holds checkpoints.")


def make_folders(args: Any) -> None:
    """Make the folders that the run writes to, when every flag has been found good."""
    for flag, folder in _folders(args):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag} {folder} cannot be made ({error.strerror}); name another folder.") from error


def _folders(args: Any) -> list[tuple[str, str]]:
    flags = (("--save", args.save), ("--output-dir", args.output_dir), ("--tensorboard-dir", args.tensorboard_dir))
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
