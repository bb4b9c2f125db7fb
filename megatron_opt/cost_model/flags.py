"""Megatron's flags as the cost model reads them: words, presets, YAML files, finished runs; no Megatron needed."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from megatron_opt import recipes, run_files, yaml_files
from megatron_opt.engine_options import INSTANCES, MODES
from megatron_opt.errors import UserError, did_you_mean, nearest
from megatron_opt.layout import flags as structure
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.groups import ParamGroupConfig, default_group_configs, load_group_configs
from megatron_opt.presets import read as preset
from megatron_opt.training.flags import conditions
from megatron_opt.training.flags.ranges import RANGES

Flags = dict[str, Any]

# Flags that change the cost; others are accepted and listed as ignored.
NUMBERS = [
    "micro-batch-size",
    "global-batch-size",
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "num-layers-per-virtual-pipeline-stage",
    "num-virtual-stages-per-pipeline-rank",
    "context-parallel-size",
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
    "recompute-num-layers",
    "exchange-bucket-mb",
    "matrix-balance",
    "scalar-lr-ratio",
    "lr",
    "weight-decay",
    "clip-grad",
    "adam-beta1",
    "adam-beta2",
    "adam-eps",
    "ema-decay",
    "train-iters",
    "train-samples",
    "lr-warmup-iters",
    "world-size",
    "lr-warmup-samples",
    "lr-warmup-fraction",
    "min-lr",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "moe-router-num-groups",
    "moe-router-group-topk",
    "num-distributed-optimizer-instances",
    "num-layers-at-start-in-bf16",
    "num-layers-at-end-in-bf16",
    "optimizer-offload-fraction",
]
WORDS = [
    "optimizer",
    "recompute-granularity",
    "recompute-method",
    "matrix-mode",
    "matrix-instances",
    "exchange-dtype",
    "optimizer-groups",
    "preset",
    "recipe",
    "fp8-format",
    "fp8-recipe",
    "lr-decay-style",
    "init-style",
    "decay-mode",
    "pipeline-model-parallel-layout",
    "recompute-modules",
    "moe-token-dispatcher-type",
    "moe-flex-dispatcher-backend",
]
SWITCHES = [
    "bf16",
    "fp16",
    "sequence-parallel",
    "use-distributed-optimizer",
    "optimizer-cpu-offload",
    "overlap-grad-reduce",
    "overlap-param-gather",
    "tp-comm-overlap",
    "use-flash-attn",
    "split-heads",
    "recompute-activations",
    "no-gradient-accumulation-fusion",
    "moe-grouped-gemm",
    "grad-reduce-in-bf16",
    "no-position-embedding",
    "use-rotary-position-embeddings",
    "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
    "overlap-moe-expert-parallel-comm",
    "activation-func-fp8-input-store",
    "fp8-param-gather",
    "first-last-layers-bf16",
]
# Of NUMBERS, those that may be fractions, and those that may be 0; all others are whole and at least 1.
_REAL = {
    "matrix-balance", "exchange-bucket-mb", "scalar-lr-ratio", "lr", "weight-decay", "clip-grad", "adam-beta1", "adam-beta2",
    "adam-eps", "lr-warmup-fraction", "min-lr", "optimizer-offload-fraction", "ema-decay",
}  # fmt: skip
_ZERO = {
    "num-experts", "moe-shared-expert-intermediate-size", "moe-first-dense-layers", "moe-layer-freq", "q-lora-rank",
    "recompute-num-layers", "train-iters", "train-samples", "lr-warmup-iters", "lr-warmup-samples",
    "moe-router-num-groups", "moe-router-group-topk", "num-layers-at-start-in-bf16", "num-layers-at-end-in-bf16",
}  # fmt: skip
_MOST = {"num-layers": 10_000, "num-experts": 10_000, "world-size": 1_000_000}
_CHOICES = {
    "normalization": ("LayerNorm", "RMSNorm"),
    "recompute-granularity": ("full", "selective"),
    "moe-token-dispatcher-type": ("allgather", "alltoall", "flex"),
    "fp8-format": ("e4m3", "hybrid"),
    "fp8-recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
    "exchange-dtype": ("fp32", "bf16"),
    "matrix-mode": MODES,
    "matrix-instances": INSTANCES,
    "decay-mode": ("decoupled", "independent", "cautious"),
}
_KNOWN = {
    **dict.fromkeys(NUMBERS, float),
    **dict.fromkeys(WORDS, str),
    **dict.fromkeys(SWITCHES, bool),
    **structure.REFUSED,  # so that `Model.of` refuses them
    **structure.FLAGS,
}
_ALIASES = {"use-rotary-position-embeddings": ("position-embedding-type", "rope")}


def parse(words: Sequence[str]) -> tuple[Flags, list[str]]:
    """Flags from a command line's words; a preset's come first, later ones win. Also the flags that change no cost."""
    given: Flags = {}
    ignored: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} is not a flag; write flags as --name value.")
        name, sign, value = word[2:].partition("=")
        values = [value] if sign else []
        while not sign and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not _known(name):
            if near := nearest(name, _KNOWN, cutoff=0.88):
                raise UserError(f"--{name} is no flag that is known here; did you mean --{near}?")
            ignored.append(name)
            continue
        if len(values) > 1 and name != "recompute-modules":
            raise UserError(f"--{name} takes one value; {values[1]!r} belongs to no flag.")
        given[name] = _value(name, values)
    base = preset(given["preset"]) if "preset" in given else {}
    recipe = recipes.of_command_line(words)
    return normalized(base | (recipe[1].flags if recipe else {}) | given), ignored


def normalized(flags: Mapping[str, Any]) -> Flags:
    """Types as the cost model wants them; flags of other matters are left out; underscores become hyphens."""
    typed: Flags = {}
    for key, value in flags.items():
        name = str(key).replace("_", "-")
        if value is None or not _known(name):
            continue
        if name in _ALIASES:
            name, value = _ALIASES[name]
        typed[name] = _value(name, [value])
    return typed


def _known(name: str) -> bool:
    return name in _KNOWN or _optimizer_option(name) is not None


def _optimizer_option(name: str) -> tuple[str, str] | None:
    """(optimizer, option) of a flag such as `muon-num-ns-steps`; the longest optimizer name wins."""
    for optimizer, cls in sorted(registry.optimizers().items(), key=lambda item: -len(item[0])):
        prefix = optimizer.replace("_", "-") + "-"
        if name.startswith(prefix):
            option = name.removeprefix(prefix).replace("-", "_")
            if option in {field.name for field in fields(cls.Config)}:  # type: ignore[attr-defined]
                return optimizer, option
    return None


def _value(name: str, values: Sequence[Any]) -> Any:
    kind = _KNOWN.get(name)
    if kind is bool or (not values and kind is None):
        if not values or isinstance(values[0], bool):
            return values[0] if values else True
        word = str(values[0]).lower()
        if word not in ("true", "1", "yes", "false", "0", "no", "none"):
            raise UserError(f"--{name} is {values[0]!r}; it is a switch: true or false.")
        return word in ("true", "1", "yes")
    if not values:
        raise UserError(f"--{name} needs a value.")
    value = values[0]
    if kind is float and name == "moe-layer-freq" and isinstance(value, str) and not value.isdigit():
        return value
    if kind is float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"--{name} is {value!r}; it must be a number.") from None
        if not number >= 0 or number == float("inf"):
            raise UserError(f"--{name} is {value}; it must be a finite number, at least 0.")
        if name not in _REAL:
            least = 0 if name in _ZERO else 1
            if isinstance(value, bool) or number != int(number) or number < least:
                raise UserError(f"--{name} is {value}; it must be a whole number, at least {least}.")
            if number > _MOST.get(name, 1e15):
                raise UserError(f"--{name} is {value}; no model has that many.")
        limits = RANGES.get(name)
        if limits is not None and number and not limits.holds(number):
            raise UserError(f"--{name} is {value}; it must be {limits.said(number)}.")
        if name in ("matrix-balance", "exchange-bucket-mb") and number == 0:
            raise UserError(f"--{name} is {value}; it must be greater than 0.")
        return int(number) if number == int(number) else number
    if name == "recompute-modules":
        words = [word for item in values for word in (item if isinstance(item, list) else str(item).split())]
        return " ".join(words)
    if kind is str:
        if name in _CHOICES and str(value) not in _CHOICES[name]:
            raise UserError(f"--{name} is {value!r}; it must be one of {', '.join(_CHOICES[name])}.")
        return str(value)
    plain, hit = _plain(value), _optimizer_option(name)
    if hit is not None:
        default = registry.optimizers()[hit[0]].Config.__dataclass_fields__[hit[1]].default  # type: ignore[attr-defined]
        if type(default) in (int, float) and (isinstance(plain, bool) or not isinstance(plain, (int, float))):
            raise UserError(f"--{name} is {value!r}; it must be a number.")
    return plain


def _plain(value: Any) -> Any:
    """An optimizer's option from a word: number, true/false, list, or the word itself."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


_DESTINATIONS = {"fp8": "fp8-format", "fp4": "fp4-format"}
_DEFAULTS = {
    "pipeline-model-parallel-size": 1, "num-distributed-optimizer-instances": 1, "matrix-mode": "auto",
    "lr-decay-style": "linear", "fp8-recipe": "delayed",
}  # fmt: skip


class _AsParsed:
    """Flags read as a run's parsed arguments, with Megatron's values for those that are not there."""

    def __init__(self, flags: Mapping[str, Any]) -> None:
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        flag = _DESTINATIONS.get(name, name.replace("_", "-"))
        return self._flags.get(flag, _DEFAULTS.get(flag))


def check_effects(flags: Mapping[str, Any], words: Sequence[str]) -> None:
    """Refuse a flag of the command line that another one leaves without effect, as a run refuses it."""
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    conditions.check_needs(_AsParsed(flags), given & _KNOWN.keys())


def from_run(path: str | Path) -> Flags:
    """Flags of a job, running, killed or finished (its folder or config.json), or of a YAML file of flags."""
    return read_run(path)[0]


def read_run(path: str | Path) -> tuple[Flags, Flags]:
    """The same, and all flags as they are written there, also those that cost nothing."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        content = run_files.flags(run_files.record(path))
        costly = {
            name: value for name, value in content.items() if name not in ("preset", "recipe")
        }  # theirs are among the run's
        return _without_defaults(normalized(costly)), content
    try:
        content = yaml_files.load(path.read_text())
    except OSError as error:
        raise UserError(
            f"--from {path} cannot be read ({error.strerror}); give a run's folder or a YAML file of flags."
        ) from error
    except UnicodeError as error:
        raise UserError(f"--from {path} is not text; give a run's folder or a YAML file of flags.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--from {path} holds no flags; write one `name: value` a line.")
    written = dict(content)
    base = preset(content.pop("preset")) if content.get("preset") else {}
    if name := content.pop("recipe", None):
        base |= recipes.of_flags(str(name), content).flags
    return normalized(base | content), written


def _without_defaults(flags: Flags) -> Flags:
    """A record names every option of the run's rules; beside their defaults some would be without effect."""
    return {name: value for name, value in flags.items() if not _is_default(name, value)}


def _is_default(name: str, value: Any) -> bool:
    hit = None if name in _KNOWN else _optimizer_option(name)
    if hit is None:
        return False
    default = registry.optimizers()[hit[0]].Config.__dataclass_fields__[hit[1]].default  # type: ignore[attr-defined]
    return bool(value == default)


def options(flags: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of optimizers among the flags, by optimizer."""
    given: dict[str, dict[str, Any]] = {}
    for name, value in flags.items():
        if name not in _KNOWN and (hit := _optimizer_option(name)):
            given.setdefault(hit[0], {})[hit[1]] = value
    return given


def grouping(flags: Mapping[str, Any]) -> list[ParamGroupConfig]:
    """The grouping that a run with these flags has; Megatron's own `adam` counts as adamw."""
    name = {"adam": "adamw"}.get(flags.get("optimizer", "adamw"), flags.get("optimizer", "adamw"))
    given = options(flags)
    if flags.get("optimizer-groups"):
        return load_group_configs(flags["optimizer-groups"], given)
    if name not in registry.optimizers():
        raise UserError(
            f"--optimizer: there is no optimizer {name!r}; there are {', '.join(sorted(registry.optimizers()))}."
            f"{did_you_mean(str(name), registry.optimizers())}"
        )
    return default_group_configs(name, given, flags.get("scalar-lr-ratio"))


def required(flags: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse flags that lack what a model needs."""
    missing = [f"--{name}" for name in names if not flags.get(name)]
    if missing:
        raise UserError(f"{', '.join(missing)} missing; give them, or a whole model by --preset.")
