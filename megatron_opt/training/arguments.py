"""Flags: Megatron's own, presets, and what this project adds."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_opt.errors import UserError
from megatron_opt.platform import on_cpu

PRESETS = Path(__file__).parent.parent / "presets"

# What a Megatron job needs to be told on CPU; put before the user's flags, so that his win.
CPU_FLAGS = (
    "--distributed-backend",
    "gloo",
    "--transformer-impl",
    "local",
    "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-dropout-fusion",
    "--no-create-attention-mask-in-dataloader",
    "--num-workers",
    "0",
    "--ckpt-format",
    "torch_dist",
    "--eval-iters",
    "10",
)
# Ours everywhere: divergence is a result of a study, and a bad matrix is skipped; both are counted and logged.
OUR_FLAGS = (
    "--no-check-for-nan-in-loss-and-grad",
    "--log-throughput",
    "--lr-wsd-decay-style",
    "linear",
)


def preset_names() -> list[str]:
    """Names of the files in `presets/`."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's flags; `base: OTHER` in a preset takes the other's flags first."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--preset {name}: there is no such preset; there are {', '.join(preset_names())}.")
    flags = yaml.safe_load(path.read_text())
    base = flags.pop("base", None)
    return (read_preset(base) if base else {}) | flags


def _as_argv(flags: dict[str, Any]) -> list[str]:
    argv: list[str] = []
    for key, value in flags.items():
        if value is True:
            argv.append(f"--{key}")
        elif value is not False and value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{key}", *map(str, values)]
    return argv


def given_flags(argv: Sequence[str]) -> set[str]:
    return {word.split("=")[0].removeprefix("--") for word in argv if word.startswith("--")}


def expand(argv: Sequence[str]) -> list[str]:
    """The command line with CPU defaults and the preset put before the user's own flags, which win."""
    argv = list(argv)
    given = given_flags(argv)
    flags: dict[str, Any] = {}
    if "preset" in given:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--preset")
        flags = read_preset(parser.parse_known_args(argv)[0].preset or "")
    for one, other in (("train-samples", "train-iters"), ("train-iters", "train-samples")):
        if one in given:  # Megatron refuses the two together
            flags = {key: value for key, value in flags.items() if not key.startswith(other)}
    if given & {"train-data-path", "data-path", "data-args-path", "per-split-data-args-path", "mock-data"}:
        flags = {key: value for key, value in flags.items() if not key.endswith("data-path")}
    flags = {key: value for key, value in flags.items() if key not in given}
    return [*OUR_FLAGS, *(CPU_FLAGS if on_cpu() else []), *_as_argv(flags), *argv]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """This project's flags, and Megatron's `--optimizer` with our names among its choices."""
    from megatron_opt.training import checkpoints, faults, record, stragglers
    from megatron_opt.training.optimizer_flags import add_optimizer_arguments

    group = parser.add_argument_group("megatron_opt")
    group.add_argument("--preset", help=f"flags from presets/NAME.yaml: {', '.join(preset_names())}")
    group.add_argument("--print-config", action="store_true", help="print every flag's value and exit")
    group.add_argument("--output-dir", help="folder for results.json and metrics.jsonl")
    group.add_argument(
        "--init-style",
        choices=["megatron", "study"],
        default="megatron",
        help="megatron: normal(0, --init-method-std), residual outputs scaled by 1/sqrt(2·layers); "
        "study: normal truncated at 3 sigma over sqrt(fan_in), embedding over hidden size (arXiv 2509.02046)",
    )
    group.add_argument(
        "--megatron-init",
        action="store_true",
        help="initialize as Megatron does, which gives every layout another model",
    )
    group.add_argument(
        "--log-samples",
        action="store_true",
        help="write the ids of the training samples of each step to OUTPUT/samples-RANK.jsonl, to check a restart by",
    )
    group.add_argument(
        "--plan-world-size",
        type=int,
        metavar="RANKS",
        help="print the optimizer plan of these flags on so many ranks, which need not be there, and exit",
    )
    add_engine_arguments(group)
    checkpoints.add_arguments(parser)
    faults.add_arguments(parser)
    stragglers.add_arguments(parser)
    record.add_arguments(parser)
    add_optimizer_arguments(parser)
    for action in parser._actions:  # a lone percent sign in Megatron's help would end --help in a traceback
        if action.help and action.help is not argparse.SUPPRESS:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def add_engine_arguments(group: Any) -> None:
    """Flags of the optimizer's distribution."""
    group.add_argument("--print-optimizer-plan", action="store_true", help="print who owns which matrix")
    group.add_argument("--optimizer-groups", metavar="FILE", help="YAML: pattern -> optimizer and options")
    group.add_argument(
        "--on-bad-matrix",
        choices=["skip", "abort"],
        default="skip",
        help="a matrix whose gradient is not finite: leave it as it is for this step and count it, or stop",
    )
    group.add_argument(
        "--matrix-mode",
        choices=["auto", "owner", "group", "sharded"],
        default="auto",
        help="compute matrices whole on one rank, cut where a rank is full, or in slices on all; auto picks by balance",
    )
    group.add_argument(
        "--matrix-balance",
        type=float,
        default=1.1,
        help="load and state of the fullest rank over the mean that --matrix-mode auto is content with: more cuts less",
    )
    group.add_argument(
        "--exchange-dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="type of gradients and updates on the wire between shards and owners",
    )
    group.add_argument(
        "--exchange-bucket-mb",
        type=float,
        default=64.0,
        help="matrices travel in buckets of this many megabytes a rank; the next one while this is computed",
    )


def _refuse(message: str) -> NoReturn:
    """In place of argparse's error, which prints hundreds of lines of usage first."""
    raise UserError(f"{message}; --help lists all flags.")


def parse(argv: Sequence[str]) -> Any:
    """Parse and check the expanded command line as Megatron does; bad input is a UserError, on every rank alike."""
    import megatron.training.arguments as megatron_arguments
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_opt.training import foresight
    from megatron_opt.training.optimizer_flags import check_optimizer_arguments

    expanded = expand(argv)
    saved, sys.argv = sys.argv, [sys.argv[0], *expanded]
    try:
        args = parse_args(add_arguments)
    finally:
        sys.argv = saved
    args.command_line, args.given_flags = list(argv), given_flags(argv)
    if args.print_config:
        print_config(args)
        raise SystemExit(0)
    if args.plan_world_size:
        args.world_size = args.plan_world_size
    foresight.check(args)
    _check(args)
    check_optimizer_arguments(args)
    name, args.optimizer = args.optimizer, "adam"  # Megatron would route other names to its layer-wise wrapper
    try:
        _quietly(validate_args, args)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"Megatron refuses these flags: {_sentence(error)}") from error
    args.optimizer = name
    # Megatron's fault-tolerance hooks parse the command line once more, without our flags and presets
    megatron_arguments.parse_args = lambda *_, **__: args
    try:
        set_global_variables(args)
    except (AssertionError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"setting up the tokenizer or a log writer failed: {_sentence(error)}") from error
    if args.plan_world_size:
        _print_plan(args)
        raise SystemExit(0)
    return args


def _print_plan(args: Any) -> None:
    from megatron_opt.distributed import planning
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN, group_rules

    if args.optimizer in MEGATRON_OWN:
        raise UserError(f"--plan-world-size plans this project's optimizers; {args.optimizer} is Megatron's.")
    planning.show(planning.from_args(args, args.plan_world_size, group_rules(args)), args.output_dir)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if text:
        return text
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Megatron prints hundreds of flags while validating; rank 0 gets them by --print-config."""
    if os.environ.get("MEGATRON_OPT_VERBOSE"):
        return function(*args)
    with open(os.devnull, "w") as sink:
        saved, sys.stdout = sys.stdout, sink
        try:
            return function(*args)
        finally:
            sys.stdout = saved


def print_config(args: Any) -> None:
    """The run's record, on rank 0."""
    from megatron_opt.training import record

    if args.rank == 0:
        record.show(args)


def _check(args: Any) -> None:
    """Refusals that Megatron would make late, unclearly or not at all."""
    world, tp, pp = args.world_size, args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, ep = args.context_parallel_size, args.expert_model_parallel_size
    if on_cpu() and cp > 1:
        raise UserError(
            f"--context-parallel-size {cp} needs Transformer Engine's attention, which needs a GPU; use 1 on CPU."
        )
    if world % (tp * pp * cp):
        raise UserError(
            f"{world} ranks are not divisible by --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp} × --context-parallel-size {cp}; change one of them or the rank count."
        )
    if args.num_attention_heads and args.num_attention_heads % tp:
        raise UserError(
            f"--num-attention-heads {args.num_attention_heads} is not divisible by --tensor-model-parallel-size {tp}."
        )
    if (
        args.hidden_size
        and args.num_attention_heads
        and args.kv_channels is None
        and args.hidden_size % args.num_attention_heads
    ):
        raise UserError(
            f"--hidden-size {args.hidden_size} is not divisible by --num-attention-heads {args.num_attention_heads}; "
            "change one, or give --kv-channels."
        )
    if args.num_experts and args.num_experts % ep:
        raise UserError(f"--num-experts {args.num_experts} is not divisible by --expert-model-parallel-size {ep}.")
    if args.fp16 and args.optimizer not in ("adam", "sgd"):
        raise UserError(f"--fp16 does not work with --optimizer {args.optimizer}; use --bf16 or fp32.")
    for flag, needed in (
        ("num_layers", "--num-layers"),
        ("hidden_size", "--hidden-size"),
        ("num_attention_heads", "--num-attention-heads"),
        ("seq_length", "--seq-length"),
    ):
        if getattr(args, flag) is None:
            raise UserError(
                f"{needed} is missing; give it, or a whole model by --preset ({', '.join(preset_names())})."
            )
    if args.lr is None and not args.plan_world_size:
        raise UserError("--lr is missing; give the learning rate, which depends on the optimizer.")
    if "make-vocab-size-divisible-by" not in args.given_flags and args.padded_vocab_size is None:
        # Megatron pads to this times TP, so that every TP size has another output layer; ours is one for all sizes
        args.make_vocab_size_divisible_by = max(1, args.make_vocab_size_divisible_by // tp)
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if warmup and decay and warmup >= decay:
            raise UserError(f"--lr-warmup-{unit} {warmup} is not below the {decay} {unit} of the schedule; lower it.")
    if args.async_save:
        if args.async_strategy == "nvrx" and "async-strategy" in args.given_flags:
            raise UserError(
                "--async-strategy nvrx: background saves have a writer of this project's own; leave it out."
            )
        args.async_strategy, args.use_persistent_ckpt_worker = "mcore", True  # else Megatron would save synchronously
        if world == tp * pp:  # nobody to share the writing with
            args.ckpt_fully_parallel_save = False
    if args.save and args.save_interval is None:
        args.save_interval = args.train_iters or 1000  # Megatron refuses to guess; ours is the end of the run
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
