"""Every hyperparameter of every optimizer as a flag, `--NAME-FIELD`, from the rules' own configurations."""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_opt.distributed.ownership import check_balance
from megatron_opt.engine_options import MEGATRONS, EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.groups import ParamGroupConfig, default_group_configs, load_group_configs
from megatron_opt.optimizers.sophia import SophiaConfig
from megatron_opt.training.flags import conditions
from megatron_opt.training.flags.refused import WITHOUT_MEANING
from megatron_opt.training.flags.table import unsupported
from megatron_opt.training.hutchinson import check_curvature
from megatron_opt.training.width import check_mup

MEGATRON_OWN = ("adam", "sgd")  # left to Megatron's optimizers, as a baseline
_ADAM_FLAGS = {"adam-beta1": "beta1", "adam-beta2": "beta2", "adam-eps": "eps"}


def _dest(name: str, field: str) -> str:
    return f"rule_{name}_{field}"


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Our optimizers among the choices of `--optimizer`, and a flag for every field of their configurations.

    Where Megatron has the same flag (`--muon-momentum`), ours takes its place.
    """
    optimizer_classes = registry.optimizers()
    for action in parser._actions:
        if action.dest == "optimizer":
            action.choices, action.default = [*MEGATRON_OWN, *sorted(optimizer_classes)], "adamw"
            action.help = "optimizer; adam and sgd are Megatron's own, the others megatron_opt's"
    divided = [name for name, each in sorted(optimizer_classes.items()) if each.scalars is not None]  # type: ignore[attr-defined]
    shared = parser.add_argument_group("optimizers")
    shared.conflict_handler = "resolve"
    shared.add_argument(
        "--scalar-lr-ratio",
        *(f"--{name}-scalar-lr-ratio".replace("_", "-") for name in divided),
        dest="scalar_lr_ratio",
        type=float,
        help="learning rate of the parameters that a matrix optimizer leaves to an element-wise one, over --lr",
    )
    for name, optimizer_class in sorted(optimizer_classes.items()):
        group = parser.add_argument_group(f"optimizer {name}", (optimizer_class.__doc__ or "").split("\n")[0])
        group.conflict_handler = "resolve"
        for field in dataclasses.fields(optimizer_class.Config):  # type: ignore[attr-defined]
            flag = f"--{name}-{field.name}".replace("_", "-")
            text = f"{field.metadata.get('help', '')} (default {field.default})".replace("%", "%%")
            kind: Any = type(field.default)
            kind = {bool: _boolean, tuple: json.loads}.get(kind, kind)
            extra: dict[str, Any] = {}
            if isinstance(field.default, bool):  # --muon-nesterov alone means true, as in Megatron
                extra = {"nargs": "?", "const": True, "metavar": "true|false"}
            elif choices := field.metadata.get("choices"):
                extra["choices"] = [*choices, *(_MEGATRON_WORDS.get(flag, {}))]
            group.add_argument(flag, dest=_dest(name, field.name), type=kind, default=None, help=text, **extra)


# words of Megatron's flags for the same thing
_MEGATRON_WORDS: dict[str, dict[str, str]] = {"--muon-fp32-matmul-prec": {"low": "medium"}}


def _adam_target(optimizer: str) -> str:
    """Whom Megatron's --adam-beta1, -beta2 and -eps speak to: the rule of the scalars where there is one."""
    scalars = getattr(registry.optimizers().get(optimizer), "scalars", None)
    return scalars.optimizer if scalars else optimizer


def given_options(args: Any, given: set[str]) -> dict[str, dict[str, Any]]:
    """Options that the user gave, by optimizer."""
    options_of: dict[str, dict[str, Any]] = {}
    adam = _adam_target(args.optimizer)
    for name, optimizer_class in registry.optimizers().items():
        fields = {field.name for field in dataclasses.fields(optimizer_class.Config)}  # type: ignore[attr-defined]
        options = {}
        if name == adam:
            options = {
                field: getattr(args, flag.replace("-", "_"))
                for flag, field in _ADAM_FLAGS.items()
                if flag in given and field in fields
            }
        for field in fields:
            value = getattr(args, _dest(name, field), None)
            if value is not None:
                flag = f"--{name}-{field}".replace("_", "-")
                value = _MEGATRON_WORDS.get(flag, {}).get(value, value) if isinstance(value, str) else value
                options[field] = tuple(map(tuple, value)) if isinstance(value, list) else value
        if options:
            options_of[name] = options
    return options_of


def read_group_configs(args: Any) -> list[ParamGroupConfig]:
    """The run's grouping: the study's for `--optimizer`, or the file of `--optimizer-groups`."""
    options = given_options(args, args.given_flags)
    if args.optimizer_groups:
        return load_group_configs(args.optimizer_groups, options)
    return default_group_configs(args.optimizer, options, args.scalar_lr_ratio)


def curvature_kind(group_configs: Sequence[ParamGroupConfig]) -> str | None:
    """The estimate that the run's Sophia groups want; None where there is no such group."""
    kinds = {
        group_config.options.get("curvature", SophiaConfig.curvature)
        for group_config in group_configs
        if group_config.optimizer == "sophia"
    }
    if len(kinds) > 1:
        raise UserError("one Sophia group wants curvature gnb, another hutchinson; choose one for both.")
    return str(kinds.pop()) if kinds else None


def check_optimizer_arguments(args: Any) -> None:
    """Refuse flags that would have no effect or another one than they say."""
    check_mup(args)
    if args.optimizer in MEGATRON_OWN:
        _refuse_ours(args)
        return
    group_configs = read_group_configs(args)
    for group_config in group_configs:
        built = registry.build(group_config.optimizer, dict(group_config.options))
        if getattr(args, "use_mup", False):
            built.width_exponent()
    if kind := curvature_kind(group_configs):
        check_curvature(args, kind)
    _check_own_schedule(args, group_configs)
    used = {group_config.optimizer for group_config in group_configs}
    for name in given_options(args, args.given_flags):
        if name not in used:
            raise UserError(
                f"--{name.replace('_', '-')}-… is given, but no parameter is trained by {name} "
                f"(--optimizer {args.optimizer} uses {', '.join(sorted(used))}); remove the flag."
            )
    check_balance(args.matrix_balance)
    conditions.check_needs(args, args.given_flags & {"matrix-balance", "matrix-instances"})
    for flag, why in WITHOUT_MEANING.items():
        if flag in args.given_flags:
            raise UserError(f"--{flag} has no meaning with --optimizer {args.optimizer}: {why}")
    for flag, why in unsupported({key.replace("_", "-"): value for key, value in vars(args).items()}):
        raise UserError(f"--{flag} does not work with --optimizer {args.optimizer}: {why}")


def _check_own_schedule(args: Any, group_configs: Sequence[ParamGroupConfig]) -> None:
    """A rule that averages in place of a schedule has its own weights to evaluate."""
    names = (each.optimizer for each in group_configs if getattr(registry.known(each.optimizer), "own_schedule", False))
    if (name := next(names, None)) is None:
        return
    if args.lr_decay_style != "constant":
        raise UserError(
            f"{name} averages its iterates in place of a decaying learning rate, and --lr-decay-style {args.lr_decay_style} "
            "would lower it besides; give --lr-decay-style constant."
        )
    if args.ema_decay:
        raise UserError(f"--ema-decay would average weights that {name} averages already; leave it out.")
    if args.qk_clip:
        raise UserError(
            f"--qk-clip scales the weights that gradients are taken at, and {name} evaluates an average of others; leave it out."
        )


@contextlib.contextmanager
def as_megatron_knows(args: Any) -> Iterator[None]:
    """While Megatron validates flags: adam, as it would route other names to its layer-wise wrapper; no offload but its own
    optimizers'; and no largest logits of local layers, which it has from Transformer Engine alone.
    """
    kept = {
        name: getattr(args, name)
        for name in ("optimizer", "optimizer_cpu_offload", "qk_clip", "log_max_attention_logit")
    }
    if args.optimizer not in MEGATRON_OWN:
        args.optimizer_cpu_offload = False
    args.optimizer = "adam"
    if args.transformer_impl == "local":
        args.qk_clip = args.log_max_attention_logit = False
    try:
        yield
    finally:
        vars(args).update(kept)


def _refuse_ours(args: Any) -> None:
    """Megatron's own optimizers read none of this project's flags."""
    names = (field.name for field in dataclasses.fields(EngineOptions))
    ours = {name.replace("_", "-") for name in names if name not in MEGATRONS}
    ours |= {"optimizer-groups", "print-optimizer-plan", "scalar-lr-ratio"}
    ours |= {
        f"{name}-{field.name}".replace("_", "-")
        for name, optimizer_class in registry.optimizers().items()
        for field in dataclasses.fields(optimizer_class.Config)  # type: ignore[attr-defined]
    }
    for flag in sorted(ours & args.given_flags):
        raise UserError(
            f"--{flag} has no effect on --optimizer {args.optimizer}, which is Megatron's own; leave it out, or give one of "
            "this project's optimizers."
        )


def refused_flags(flags: Mapping[str, Any], optimizer: str) -> list[str]:
    """Which of a run's flags (name with hyphens → value) a job with this optimizer would refuse, and why."""
    if optimizer in MEGATRON_OWN:
        return []
    sentences = [f"--{flag}: {why}" for flag, why in WITHOUT_MEANING.items() if flags.get(flag) not in (None, False)]
    sentences += [f"--{flag}: {why}" for flag, why in unsupported(flags)]
    if flags.get("fp16"):
        sentences.append("--fp16: gradients would be scaled; use --bf16 or fp32.")
    return sentences
