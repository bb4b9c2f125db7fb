"""What a run would meet late, looked at before it starts: refused in a sentence, or said."""

from typing import Any

from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixOptimizer
from megatron_opt.training import console, sinks
from megatron_opt.training.optimizer_flags import MEGATRON_OWN, read_group_configs

_OF_MATRICES = (
    "matrix-mode",
    "matrix-balance",
    "matrix-instances",
    "exchange-dtype",
    "exchange-bucket-mb",
    "split-heads",
)


def check(args: Any) -> None:
    """Refuse what would end in a traceback later; before Megatron's own validation."""
    for flag in ("log_interval", "tensorboard_log_interval"):
        if getattr(args, flag) < 1:
            raise UserError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: lines are written every N steps; give 1 or more."
            )
    if args.eval_interval is not None and args.eval_interval < 1:
        raise UserError(f"--eval-interval {args.eval_interval}: give 1 or more, --train-iters for the end alone.")
    if args.eval_samples is not None:
        if args.eval_samples < 1:
            raise UserError(f"--eval-samples {args.eval_samples}: give 1 or more, or --eval-iters 0 for no evaluation.")
        if args.full_validation or "eval-iters" in args.given_flags:
            raise UserError(
                "--eval-samples, --eval-iters and --full-validation each say how much is evaluated; give one."
            )
        args.eval_iters = max(1, args.eval_iters or 0)
    if (args.eval_iters or 0) < 0:
        raise UserError(f"--eval-iters {args.eval_iters}: give 0 for no evaluation, or more.")
    args.whole_validation = bool(args.full_validation)
    if args.whole_validation:  # Megatron's own counts some samples twice; ours reads each once
        args.full_validation, args.eval_iters = False, max(1, args.eval_iters or 0)
    sinks.check(args)


def tell(args: Any) -> None:
    """Rank 0 says what a user may not mean."""
    if args.rank:
        return
    for unit in ("iters", "samples"):
        decay, total = getattr(args, f"lr_decay_{unit}"), getattr(args, f"train_{unit}")
        if decay and total and decay < total and args.lr_decay_style != "constant":
            end = args.min_lr or 0.0
            rest = "the learning rate is 0" if end == 0 else f"the learning rate stays at {end:g}"
            console.note(
                f"--lr-decay-{unit} {decay} is below --train-{unit} {total}: from {unit[:-1]} {decay} on {rest}."
            )
    dropout = [
        f"--{name}-dropout {value:g}" for name in ("attention", "hidden") if (value := getattr(args, f"{name}_dropout"))
    ]
    if dropout:
        console.note(
            f"{' and '.join(dropout)}: another layout draws other units, so its losses differ; 0 makes layouts agree."
        )
    if idle := without_matrices(args):
        console.note(
            f"{', '.join(idle)} {'have' if len(idle) > 1 else 'has'} no effect: --optimizer {args.optimizer} is "
            "element-wise, and no matrix is computed as a whole or sent."
        )


def without_matrices(args: Any) -> list[str]:
    """Given flags of matrices in a run that no matrix rule trains; studies give all their runs the same ones."""
    if args.optimizer in MEGATRON_OWN:
        return []
    if any(issubclass(registry.known(group.optimizer), MatrixOptimizer) for group in read_group_configs(args)):
        return []
    return [f"--{flag}" for flag in _OF_MATRICES if flag in args.given_flags]
