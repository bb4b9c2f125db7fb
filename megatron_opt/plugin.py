"""This project's optimizers for an unmodified Megatron-LM: `import megatron_opt.plugin` as a script's first import.

`--optimizer` then knows our names, each with its flags (`--soap-precondition-frequency` …), and where Megatron has the
name too (muon, soap, lion), ours is used; adam and sgd stay Megatron's own. The script, its model and data stay as they
are. A program without Megatron's flags gets ours from `get_megatron_optimizer(OptimizerConfig(optimizer="soap"), …)`.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_opt import platform


def install() -> None:
    """Put our flags and optimizers into Megatron, once a process."""
    platform.activate()
    import megatron.core.optimizer as core
    import megatron.training.arguments as arguments
    import megatron.training.training as training

    if hasattr(core, "_megatron_opt"):
        return
    core._megatron_opt = True  # type: ignore[attr-defined]
    arguments.parse_args = _parse(arguments.parse_args)
    arguments.validate_args = _validate(arguments.validate_args)
    core.get_megatron_optimizer = training.get_megatron_optimizer = _make(core.get_megatron_optimizer)
    if platform.on_cpu():
        training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)


def _parse(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_opt.training.arguments import add_engine_arguments, given_flags
    from megatron_opt.training.optimizer_flags import add_optimizer_arguments

    @functools.wraps(original)
    def parse_args(extra_args_provider: Any = None, ignore_unknown_args: bool = False) -> Any:
        def with_ours(parser: Any) -> Any:
            parser = extra_args_provider(parser) if extra_args_provider else parser
            add_engine_arguments(parser.add_argument_group("megatron_opt"))
            add_optimizer_arguments(parser)
            parser.set_defaults(output_dir=None)
            return parser

        args = original(with_ours, ignore_unknown_args)
        args.given_flags = given_flags(sys.argv[1:])
        return args

    return parse_args


def _validate(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_opt.checkpointing import resuming
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN, as_megatron_knows, check_optimizer_arguments

    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **named: Any) -> Any:
        if args.optimizer in MEGATRON_OWN:
            return original(args, *rest, **named)
        check_optimizer_arguments(args)
        with as_megatron_knows(args):
            validated = original(args, *rest, **named)
        resuming.install()
        return validated

    return validate_args


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_opt.optimizers import registry
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN

    @functools.wraps(original)
    def get_megatron_optimizer(config: Any, model_chunks: Sequence[Any], *rest: Any, **named: Any) -> Any:
        if config.optimizer in MEGATRON_OWN or config.optimizer not in registry.optimizers():
            return original(config, model_chunks, *rest, **named)
        from megatron.training import global_vars

        args = global_vars._GLOBAL_ARGS
        if args is not None and getattr(args, "optimizer", None) == config.optimizer:
            from megatron_opt.training.job import make_optimizer

            return make_optimizer(config, model_chunks)
        from megatron_opt.distributed.build import build_optimizer
        from megatron_opt.optimizers.groups import default_group_configs

        return build_optimizer(config, model_chunks, default_group_configs(config.optimizer))

    return get_megatron_optimizer


install()
