"""Parameter groups as data: pattern → optimizer and options, first match wins, nothing left over, nothing unmatched."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_opt import yaml_files
from megatron_opt.errors import UserError
from megatron_opt.optimizers import mup, registry
from megatron_opt.optimizers.base import DECAY_MODES, MatrixInfo, MatrixOptimizer
from megatron_opt.optimizers.options import number

KINDS = ("hidden", "embedding", "output", "router", "norm", "bias", "ssm")
UNDECAYED = ("embedding", "norm", "bias", "ssm")  # the study decays the output layer, not these
_MOST = 1e6  # no factor on a learning rate and no decay is meant to be larger

Options = Mapping[str, Any]


@dataclass(frozen=True)
class ParamGroupConfig:
    """One line of a grouping.

    `match`: a regular expression searched in the global name, or `kind=hidden,router`, or `role=q,k`.
    `lr_scale`: factor on the run's learning rate. `weight_decay`: true the run's, false none, a number that value,
    unset by kind (norms, embeddings and biases not). `clip`: true with the other clipped groups by one norm, a word
    with the groups of that word, false never, unset as the optimizer's paper. `optional`: may match nothing.
    """

    match: str
    optimizer: str
    options: Options = field(default_factory=dict)
    lr_scale: float = 1.0
    weight_decay: bool | float | None = None
    decay_mode: str | None = None
    clip: bool | str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr_scale", self._number("lr_scale"))
        if not isinstance(self.weight_decay, bool | None):
            object.__setattr__(self, "weight_decay", self._number("weight_decay", " (or true, false)"))
        if self.decay_mode not in (None, *DECAY_MODES):
            self._refuse("decay_mode", f"one of {', '.join(DECAY_MODES)}")
        if not isinstance(self.clip, bool | str | None) or self.clip == "":
            self._refuse("clip", "true, false or a word")
        if not isinstance(self.optional, bool):
            self._refuse("optional", "true or false")
        if not isinstance(self.options, Mapping):
            self._refuse("options", "a mapping of option to value")
        if not isinstance(self.match, str):
            self._refuse("match", "text")
        try:
            re.compile(self.match)
        except re.error as error:
            raise UserError(f"group {self.match!r} is not a regular expression: {error}; mend it.") from error

    def _number(self, key: str, more: str = "") -> float:
        """A factor of the run's value."""
        value = number(getattr(self, key))
        if value is None or not 0 <= value <= _MOST:
            self._refuse(key, f"a number from 0 to {_MOST:g}{more}")
        return float(value)

    def _refuse(self, key: str, wanted: str) -> NoReturn:
        raise UserError(f"group {self.match!r}: {key} is {getattr(self, key)!r}; it must be {wanted}.")

    def takes(self, info: MatrixInfo) -> bool:
        """Whether the pattern matches, other groups aside."""
        key, _, words = self.match.partition("=")
        if key in ("kind", "role") and words:
            return getattr(info, key) in words.split(",")
        return re.search(self.match, info.name) is not None


@dataclass(frozen=True)
class Group:
    """Matrices that share an optimizer, its options, learning-rate factor, decay and clipping."""

    name: str
    optimizer: str
    options: Options
    lr_scale: float
    weight_decay: bool | float
    decay_mode: str
    clip_scope: str | None  # groups with the same word are clipped by one norm over all of them; None: not clipped
    infos: tuple[MatrixInfo, ...]

    def decay(self, run_value: float) -> float:
        """Weight decay of this group in a run whose own is `run_value`."""
        if isinstance(self.weight_decay, bool):
            return run_value if self.weight_decay else 0.0
        return self.weight_decay

    @property
    def numel(self) -> int:
        """Parameters in the group."""
        return sum(info.numel for info in self.infos)


def default_group_configs(
    optimizer: str, flags: Mapping[str, Options] | None = None, scalar_lr_scale: float | None = None
) -> list[ParamGroupConfig]:
    """The study's grouping for an optimizer.

    `flags` holds the options the user gave, by optimizer name; they win over the study's values. `scalar_lr_scale` is
    the learning-rate factor of the group that the matrix rule does not take.
    """
    flags = flags or {}

    def options(name: str, tuned: Options | None = None) -> dict[str, Any]:
        return {**(tuned or {}), **flags.get(name, {})}

    cls = registry.known(optimizer)
    if cls.scalars is None:
        if scalar_lr_scale is not None:
            raise UserError(f"{optimizer} takes all parameters: there is no other group for a learning-rate factor.")
        everything = ParamGroupConfig(".*", optimizer, options(optimizer))
        if not cls.clipped_kinds:
            return [everything]
        kinds = f"kind={','.join(cls.clipped_kinds)}"
        return [replace(everything, match=kinds, clip=True, optional=True), replace(everything, clip=False)]

    def rest(clip: bool | str, decay: float | None = None) -> ParamGroupConfig:
        name, tuned = cls.scalars.optimizer, options(cls.scalars.optimizer, cls.scalars.options)
        scale = cls.scalars.lr_scale if scalar_lr_scale is None else scalar_lr_scale
        return ParamGroupConfig(".*", name, tuned, scale, weight_decay=decay, clip=clip, optional=True)

    hidden = ParamGroupConfig("kind=hidden", optimizer, options(optimizer), clip=False)
    if cls.projects:
        output = ParamGroupConfig(
            "kind=output", "adam_h", options("adam_h"), weight_decay=False, clip="output", optional=True
        )
        return [replace(hidden, weight_decay=False, clip="hidden"), output, rest(clip="rest")]
    decay = {"constrained": 1.0, "unconstrained": 0.0}.get(hidden.options.get("form", ""))
    return [replace(hidden, weight_decay=decay), rest(clip=True, decay=decay)]


def load_group_configs(path: str | Path, flags: Mapping[str, Options] | None = None) -> list[ParamGroupConfig]:
    """Rules from a YAML file with a list `groups`; `flags` are the command line's options, which rules override."""
    try:
        content = yaml_files.load(Path(path).read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"--optimizer-groups {path} cannot be read as YAML ({why}); name a file of groups.") from error
    entries = content.get("groups") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no list `groups`; write one entry (match, optimizer, …) for each group.")
    return read_rules(str(path), entries, flags)


def read_rules(
    where: str, entries: Sequence[Mapping[str, Any]], flags: Mapping[str, Options] | None = None
) -> list[ParamGroupConfig]:
    """Rules from the entries of a file's list `groups`; `where` is what complaints name."""
    known = {item.name for item in fields(ParamGroupConfig)}
    group_configs = []
    for number_of, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping) or not {"match", "optimizer"} <= set(entry):
            raise UserError(f"{where}, group {number_of}: give at least `match` and `optimizer`.")
        if unknown := sorted(set(entry) - known):
            raise UserError(f"{where}, group {number_of} has no key {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        try:
            group_configs.append(_read_group_config(entry, flags or {}))
        except UserError as error:
            raise UserError(f"{where}, group {number_of}: {error}") from error
    return group_configs


def _read_group_config(entry: Mapping[str, Any], flags: Mapping[str, Options]) -> ParamGroupConfig:
    """An entry's rule; its options win over the command line's, and what is wrong with it is refused here."""
    group_config = ParamGroupConfig(**{**entry, "options": entry.get("options") or {}})
    options = registry.read_options(
        group_config.optimizer, {**flags.get(group_config.optimizer, {}), **group_config.options}
    )
    registry.build(group_config.optimizer, options)
    return replace(group_config, options=options)


def assign(
    infos: Sequence[MatrixInfo],
    group_configs: Sequence[ParamGroupConfig],
    decay_mode: str = "decoupled",
    width_ratio: float | None = None,
) -> list[Group]:
    """Every matrix into the group of the first rule that takes it.

    `width_ratio`, the model's width over the one that hyperparameters were tuned at, scales learning rates (`mup.py`).
    Raises UserError for matrices that no rule takes, rules that take none, and rules that cannot take what they match.
    """
    taken: dict[tuple[int, bool | float, float], list[MatrixInfo]] = {}
    built = [registry.build(group_config.optimizer, dict(group_config.options)) for group_config in group_configs]
    left, hits, matched = [], [0] * len(group_configs), [0] * len(group_configs)
    for info in infos:
        takers = [index for index, group_config in enumerate(group_configs) if group_config.takes(info)]
        for index in takers:
            matched[index] += 1
        if not takers:
            left.append(info.name)
            continue
        first = takers[0]
        hits[first] += 1
        group_config = group_configs[first]
        decay = group_config.weight_decay if group_config.weight_decay is not None else info.kind not in UNDECAYED
        scale = group_config.lr_scale * mup.lr_multiplier(built[first], info, width_ratio or 1.0)
        taken.setdefault((first, decay, scale), []).append(info)
    if left:
        raise UserError(
            f"no group takes {len(left)} parameters ({_some(left)}); add a group that matches them, such as '.*', last."
        )
    for index, group_config in enumerate(group_configs):
        if not hits[index] and not group_config.optional:
            why = "earlier groups take all it matches" if matched[index] else "no parameter has such a name"
            names = _some([info.name for info in infos])
            raise UserError(f"group {group_config.match!r} is empty: {why}; mend or remove it. Names are like {names}.")
    groups: list[Group] = []
    for (index, decay, scale), members in sorted(
        taken.items(), key=lambda item: (item[0][0], -item[0][1], -item[0][2])
    ):
        group_config = group_configs[index]
        _check_members(group_config, built[index], members, decay)
        clip = built[index].clip if group_config.clip is None else group_config.clip
        groups.append(
            Group(
                name=f"{group_config.optimizer}.{index}.{len(groups)}",
                optimizer=group_config.optimizer,
                options=group_config.options,
                lr_scale=scale,
                weight_decay=decay,
                decay_mode=group_config.decay_mode or decay_mode,
                clip_scope=("global" if clip is True else clip) or None,
                infos=tuple(members),
            )
        )
    _check_rates(groups)
    return groups


def _check_rates(groups: Sequence[Group]) -> None:
    for name in sorted(
        {group.optimizer for group in groups if getattr(registry.known(group.optimizer), "one_rate", False)}
    ):
        scales = sorted({group.lr_scale for group in groups if group.optimizer == name})
        if len(scales) > 1:
            raise UserError(
                f"{name} estimates one learning rate for all that it trains, and its groups have lr_scale "
                f"{' and '.join(f'{scale:g}' for scale in scales)}; give them the same (--optimizer-groups)."
            )


def _check_members(
    group_config: ParamGroupConfig, optimizer: Any, members: Sequence[MatrixInfo], decay: bool | float
) -> None:
    if not isinstance(optimizer, MatrixOptimizer):
        return
    vectors = [info.name for info in members if len(info.shape) != 2]
    if vectors and not optimizer.vectors:
        raise UserError(
            f"{group_config.optimizer} works on matrices, and group {group_config.match!r} gives it vectors ({_some(vectors)}); "
            "put a group for them first, such as kind=norm,bias with adamw."
        )
    if optimizer.projects and decay:
        raise UserError(
            f"{group_config.optimizer} keeps each weight's norm, so weight decay means nothing on group {group_config.match!r}; "
            "set its weight_decay to false."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def describe(groups: Sequence[Group], weight_decay: float | None = None) -> str:
    """A table of the grouping: matrices, parameters, optimizer, options, learning-rate factor, decay, clipping."""
    rows = [("optimizer", "kinds", "matrices", "parameters", "lr ×", "decay", "clip", "options")]
    for group in groups:
        kinds = ",".join(dict.fromkeys(info.kind for info in group.infos))
        if weight_decay is None and isinstance(group.weight_decay, bool):
            decay = "yes" if group.weight_decay else "no"
        else:
            decay = f"{group.decay(weight_decay or 0.0):g}"
        if group.decay_mode != "decoupled":
            decay += f" {group.decay_mode}"
        options = " ".join(f"{key}={value}" for key, value in sorted(group.options.items()))
        counts = (str(len(group.infos)), f"{group.numel:,}")
        rows.append((group.optimizer, kinds, *counts, f"{group.lr_scale:g}", decay, group.clip_scope or "no", options))
    total = (str(sum(len(group.infos) for group in groups)), f"{sum(group.numel for group in groups):,}")
    rows.append(("total", "", *total, "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = (2, 3, 4)
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
