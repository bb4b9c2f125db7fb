"""`--help` in a page, `--help-all` with all of Megatron's flags, and argparse's complaints as sentences."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_opt.errors import UserError, explained

_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|-(inf|nan)$", re.I)
# what a first run needs, by subject; all of it Megatron's but for the optimizer
_FIRST = {
    "model": "preset num-layers hidden-size num-attention-heads seq-length swiglu position-embedding-type",
    "data": "train-data-path valid-data-path tokenizer-type tokenizer-model vocab-size mock-data",
    "batch and schedule": "micro-batch-size global-batch-size train-iters lr min-lr lr-decay-style lr-warmup-iters "
    "weight-decay clip-grad bf16",
    "layout": "tensor-model-parallel-size pipeline-model-parallel-size expert-model-parallel-size "
    "use-distributed-optimizer",
    "evaluation and checkpoints": "eval-interval eval-iters log-interval save save-interval load output-dir",
}
_POINTERS = """Every rule's own flags: megatron-opt optimizers [NAME].  Every flag, Megatron-LM's several hundred too: --help-all.
The value of every flag of a command line: --print-config.  Documentation: docs/flags.md."""


class _Whole(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        parser.print_help()
        parser.exit()


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=40, width=120)


def short_help(parser: argparse.ArgumentParser, ours: Sequence[Any]) -> str:
    """This project's groups of flags (rules' options left out) and the flags of a first run, in about a page."""
    brief = argparse.ArgumentParser(prog=parser.prog, usage="%(prog)s FLAGS", add_help=False, epilog=_POINTERS,
                                    formatter_class=_wide)  # fmt: skip
    by_name = {name: action for action in parser._actions for name in action.option_strings}
    for title, words in _FIRST.items():
        group = brief.add_argument_group(title)
        for word in words.split():
            group._add_action(by_name[f"--{word}"])
    shown = {
        name for group in brief._action_groups for action in group._group_actions for name in action.option_strings
    }
    for group in ours:
        copy = brief.add_argument_group(group.title)
        for action in group._group_actions:
            if not shown & set(action.option_strings):
                copy._add_action(action)
    return brief.format_help()


def install(parser: argparse.ArgumentParser, ours: Sequence[Any]) -> None:
    """Give a parser of the job its two helps (`ours`: groups shown in the short one) and sentences for what it cannot read."""

    class Short(argparse._HelpAction):
        def __call__(self, *rest: Any) -> NoReturn:
            print(short_help(parser, ours))
            parser.exit()

    brief = parser._option_string_actions["--help"]
    brief.__class__, brief.help = Short, "show what a first run needs and exit"
    parser.add_argument("--help-all", action=_Whole, nargs=0, help="show every flag, Megatron-LM's too, and exit")
    for action in parser._actions:  # a lone percent sign in Megatron's help would end --help in a traceback
        if action.help and action.help is not argparse.SUPPRESS:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)

    parser._negative_number_matcher = _NEGATIVE  # argparse takes -1e-3 and -inf for flags

    def refuse(message: str) -> NoReturn:
        raise UserError(explained(parser, message))

    parser.error = refuse  # type: ignore[method-assign]
