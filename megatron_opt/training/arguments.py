"""Flags: Megatron's own, presets, and what this project adds."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_opt import engine_options, presets, recipes
from megatron_opt.errors import UserError
from megatron_opt.platform import on_cpu

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
    "--no-one-logger",
    "--lr-wsd-decay-style",
    "linear",
)


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
    """The command line with CPU defaults, preset and recipe put before the user's own flags, which win."""
    argv = list(argv)
    given = given_flags(argv)
    flags: dict[str, Any] = {}
    if "preset" in given:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--preset")
        flags = presets.read(parser.parse_known_args(argv)[0].preset or "")
    if recipe := recipes.of_command_line(argv):
        flags |= recipe[1].flags
    for one, other in (("train-samples", "train-iters"), ("train-iters", "train-samples")):
        if one in given:  # Megatron refuses the two together
            flags = {key: value for key, value in flags.items() if not key.startswith(other)}
    if given & {"train-data-path", "data-path", "data-args-path", "per-split-data-args-path", "mock-data"}:
        flags = {key: value for key, value in flags.items() if not key.endswith("data-path")}
    flags = {key: value for key, value in flags.items() if key not in given}
    return [*OUR_FLAGS, *(CPU_FLAGS if on_cpu() else []), *_as_argv(flags), *argv]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """This project's flags, and Megatron's `--optimizer` with our names among its choices."""
    from megatron_opt.checkpointing import compared, saving
    from megatron_opt.training import faults, fp8_ranges, record, stragglers
    from megatron_opt.training.flags import helping
    from megatron_opt.training.optimizer_flags import add_optimizer_arguments

    of_megatron = len(parser._action_groups)
    group = parser.add_argument_group("megatron_opt")
    group.add_argument("--preset", help=f"flags from presets/NAME.yaml: {', '.join(presets.names())}")
    group.add_argument("--recipe", help=f"the optimizer's settings of a published run: {', '.join(recipes.names())}")
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
        "--train-epochs",
        type=int,
        metavar="E",
        help="read the first 1/E of the run's training samples E times, each time in another order; 1: refuse to repeat any "
        "(default: repeat where the data end)",
    )
    group.add_argument(
        "--z-loss-coeff",
        type=float,
        default=0.0,
        metavar="C",
        help="add C·log²Z of the logits to each token's loss (0; 1e-4 is usual)",
    )
    group.add_argument(
        "--plan-world-size",
        type=int,
        metavar="RANKS",
        help="print the optimizer plan of these flags on so many ranks, which need not be there, and exit",
    )
    fp8_ranges.add_arguments(group)
    add_engine_arguments(group)
    saving.add_arguments(parser)
    faults.add_arguments(parser)
    stragglers.add_arguments(parser)
    record.add_arguments(parser)
    add_optimizer_arguments(parser)
    helping.install(
        parser, [g for g in parser._action_groups[of_megatron:] if not str(g.title).startswith("optimizer ")]
    )
    compared.know(parser._actions)
    return parser


def add_engine_arguments(group: Any) -> None:
    """Flags of the optimizer's distribution."""
    group.add_argument("--print-optimizer-plan", action="store_true", help="print who owns which matrix")
    group.add_argument("--optimizer-groups", metavar="FILE", help="YAML: pattern -> optimizer and options")
    engine_options.add_arguments(group)


def parse(argv: Sequence[str]) -> Any:
    """Parse and check the expanded command line as Megatron does; bad input is a UserError, on every rank alike."""
    import megatron.training.arguments as megatron_arguments
    import megatron.training.training as training
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_opt.checkpointing import resuming
    from megatron_opt.distributed.meta_model import model_config
    from megatron_opt.training import foresight
    from megatron_opt.training.flags import checks, fp8, vocabulary
    from megatron_opt.training.flags.sentences import Flags, building, told
    from megatron_opt.training.optimizer_flags import as_megatron_knows, check_optimizer_arguments

    expanded = expand(argv)
    if "yaml-cfg" in given_flags(argv):
        raise UserError("--yaml-cfg would replace every flag by Megatron's own reader; write the file as a preset.")
    made: list[argparse.ArgumentParser] = []
    saved, sys.argv = sys.argv, [sys.argv[0], *expanded]

    def ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.append(add_arguments(parser))
        return parser

    try:
        args = told("a flag cannot be read", Flags({}), parse_args, ours)
    finally:
        sys.argv = saved
    actions = made[0]._actions
    flags = Flags.of(actions)
    args.command_line, args.given_flags = list(argv), given_flags(argv)
    if args.recipe and args.rank == 0 and (recipe := recipes.of_command_line(argv)):
        print(recipes.shown(*recipe), flush=True)
    if args.print_config:
        print_config(args)
        raise SystemExit(0)
    if args.plan_world_size:
        args.world_size = args.plan_world_size
    checks.before(args, actions, given_flags(expanded))
    foresight.check(args)
    if args.use_checkpoint_args:
        told("--use-checkpoint-args", flags, resuming.take_flags, args, given_flags(expanded))
    checks.model_and_layout(args)
    check_optimizer_arguments(args)
    with as_megatron_knows(args):
        told("Megatron refuses these flags", flags, _quietly, validate_args, args)
    fp8.check_sizes(args)
    # Megatron's fault-tolerance hooks parse the command line once more, without our flags and presets
    megatron_arguments.parse_args = lambda *_, **__: args
    vocabulary.install()
    tokenizer = f"--tokenizer-type {args.tokenizer_type}"
    tokenizer += f" --tokenizer-model {args.tokenizer_model}" if args.tokenizer_model else ""
    told(f"setting up {tokenizer} or a log writer failed", flags, _quietly, set_global_variables, args)
    vocabulary.check(args)
    told("Megatron refuses this model", flags, model_config, args)
    if args.plan_world_size:
        _print_plan(args)
        raise SystemExit(0)
    checks.make_folders(args)
    training.get_model = building(training.get_model, flags)
    return args


def _print_plan(args: Any) -> None:
    from megatron_opt.distributed import planning
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN, read_group_configs

    if args.optimizer in MEGATRON_OWN:
        raise UserError(f"--plan-world-size plans this project's optimizers; {args.optimizer} is Megatron's.")
    planning.show(planning.from_args(args, args.plan_world_size, read_group_configs(args)), args.output_dir)


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
