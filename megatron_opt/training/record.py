"""The record of a run, config.json in --output-dir, written at its start: what trained, with every option resolved.

results.json, `--print-config`, TensorBoard and W&B give this record; `migrate`, `cost` and `study` read it.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_opt
from megatron_opt import run_files
from megatron_opt.files import sha256, write_atomic

_PACKAGES = {
    "torch": "torch",
    "megatron_core": "megatron-core",
    "transformer_engine": "transformer-engine",
    "apex": "apex",
}
_OURS = ("command_line", "given_flags", "wandb_exp_name", "wandb_save_dir")
_parser: argparse.ArgumentParser | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of what a run records and shows, and the defaults that its flags are compared with."""
    from megatron.training import global_vars

    from megatron_opt.training import sinks, validation

    global _parser
    _parser = parser
    global_vars._set_wandb_writer = sinks.start_wandb
    group = parser.add_argument_group("megatron_opt record")
    group.add_argument(
        "--megatron-log",
        action="store_true",
        help="show Megatron's own lines on the terminal, which otherwise go to OUTPUT/logs alone",
    )
    validation.add_arguments(group)


def git_revision() -> str | None:
    """Commit of the source tree that this package runs from, or None."""
    folder = Path(megatron_opt.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Of what trains; packages that are not installed are left out."""
    versions_of = {"megatron_opt": megatron_opt.__version__, "python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            versions_of[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions_of


def layout(args: Any) -> dict[str, int]:
    """Degrees of parallelism."""
    return {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "dp": args.data_parallel_size,
        "ep": args.expert_model_parallel_size,
        "cp": args.context_parallel_size,
    }


def groups(args: Any, built: Any = None) -> list[dict[str, Any]]:
    """The parameter groups with every option of their rules; with `built`, the optimizer's groups, what they hold too."""
    from megatron_opt.optimizers import registry
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN, read_group_configs

    if args.optimizer in MEGATRON_OWN:
        names = {"adam": ("adam_beta1", "adam_beta2", "adam_eps"), "sgd": ("sgd_momentum",)}[args.optimizer]
        options = {name.removeprefix(f"{args.optimizer}_"): getattr(args, name) for name in names}
        one = {"match": ".*", "optimizer": args.optimizer, "options": options, "lr": args.lr}
        return [one | {"weight_decay": args.weight_decay}]

    def options_of(name: str, given: Any) -> dict[str, Any]:
        return {
            key: _plain(value) for key, value in dataclasses.asdict(registry.build(name, dict(given)).config).items()
        }

    def lr(scale: float) -> float | None:
        return None if args.lr is None else args.lr * scale

    if built is not None:
        return [
            {
                "name": group.name,
                "optimizer": group.optimizer,
                "options": options_of(group.optimizer, group.options),
                "lr": lr(group.lr_scale),
                "lr_scale": group.lr_scale,
                "weight_decay": group.decay(args.weight_decay),
                "decay_mode": group.decay_mode,
                "clip": group.clip_scope,
                "kinds": list(dict.fromkeys(info.kind for info in group.infos)),
                "matrices": len(group.infos),
                "parameters": group.numel,
            }
            for group in built
        ]
    return [
        {
            "match": group_config.match,
            "optimizer": group_config.optimizer,
            "options": options_of(group_config.optimizer, group_config.options),
            "lr": lr(group_config.lr_scale),
            "lr_scale": group_config.lr_scale,
            "weight_decay": group_config.weight_decay,
            "decay_mode": group_config.decay_mode or args.decay_mode,
            "clip": group_config.clip,
        }
        for group_config in read_group_configs(args)
    ]


def config(args: Any, built_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Every flag's value in effect: an optimizer's options as their groups have them, none of rules that train nothing."""
    from megatron_opt.training.optimizer_flags import MEGATRON_OWN

    values = {
        key: _plain(value)
        for key, value in sorted(vars(args).items())
        if not key.startswith(("_", "rule_")) and key not in ("command_line", "given_flags")
    }
    if args.optimizer in MEGATRON_OWN:
        return values
    for name in ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum"):
        values.pop(name, None)
    for name in {group["optimizer"] for group in built_groups}:
        options = [group["options"] for group in built_groups if group["optimizer"] == name]
        for key, value in options[0].items():
            if all(each[key] == value for each in options):  # else only the groups can say
                values[f"rule_{name}_{key}"] = value
    if values.get("optimizer_groups"):
        values["optimizer_groups"] = str(Path(values["optimizer_groups"]).resolve())
    return values


def changed(args: Any) -> dict[str, Any]:
    """Flags, name with hyphens, whose value is not the parser's default."""
    defaults = {} if _parser is None else {action.dest: action.default for action in _parser._actions}
    values = {}
    for dest, default in sorted(defaults.items()):
        value = getattr(args, dest, None)
        if value != default and value is not None and dest not in _OURS:
            values[dest.removeprefix("rule_").replace("_", "-")] = _plain(value)
    return values


def data(args: Any) -> list[dict[str, Any]]:
    """Each dataset's digest: SHA-256 of its .idx, size of its .bin."""
    from megatron_opt.training import data_flags

    digests = []
    for prefix in data_flags.resolve(args).prefixes():
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        entry: dict[str, Any] = {"prefix": str(prefix)}
        try:
            entry["idx_sha256"] = sha256(index)
            entry["bin_bytes"] = tokens.stat().st_size
        except OSError:
            pass
        digests.append(entry)
    return digests


def tokenizer(args: Any) -> dict[str, Any]:
    """The tokenizer's file, its digest and the padded vocabulary."""
    model = getattr(args, "tokenizer_model", None)
    digest = None
    if model and Path(model).is_file():
        digest = sha256(Path(model))
    return {"model": model, "vocab_size": getattr(args, "padded_vocab_size", None), "sha256": digest}


def build(args: Any, built: Any = None) -> dict[str, Any]:
    """The record; `built` are the optimizer's groups once there are some."""
    built_groups = groups(args, built)
    return {
        "optimizer": args.optimizer,
        "preset": args.preset,
        "seed": args.seed,
        "groups": built_groups,
        "flags": changed(args),
        "argv": args.command_line,
        "world_size": args.world_size,
        "layout": layout(args),
        "versions": versions(),
        "git_revision": git_revision(),
        "data": data(args),
        "validation": getattr(args, "validation_identity", None),
        "tokenizer": tokenizer(args),
        "config": config(args, built_groups),
    }


def write(args: Any, built: Any = None) -> None:
    """Rank 0 puts the record into --output-dir."""
    if args.output_dir and args.rank == 0:
        write_atomic(Path(args.output_dir) / run_files.CONFIG, json.dumps(build(args, built), indent=1) + "\n")


def show(args: Any) -> None:
    """For `--print-config`: the flags in effect, one a line, then the parameter groups with every option."""
    built_groups = groups(args)
    values = config(args, built_groups)
    width = max(map(len, values))
    for key in sorted(values):
        print(f"{key:<{width}}  {values[key]}")
    for group in built_groups:
        options = " ".join(f"{key}={value}" for key, value in group["options"].items())
        print(f"group {group['match']}: {group['optimizer']}, lr {group['lr']}, {options}")


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
