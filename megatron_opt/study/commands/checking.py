"""Every name and value of a study file against the optimizers' own options and the job's ranges, before anything starts."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from megatron_opt.cost_model import cluster
from megatron_opt.errors import UserError, nearest_or_all
from megatron_opt.optimizers import registry
from megatron_opt.study import batch_ramp
from megatron_opt.study.hyperparameters import FLAGS, SCHEDULE, flag_of
from megatron_opt.study.spec import OptimizerSpace, Regime, Study
from megatron_opt.study.yaml_lines import load
from megatron_opt.training.flags.ranges import RANGES, Range
from megatron_opt.yaml_files import LocatedDict

OF_MEGATRON = ("adam", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd", "inverse-square-root")
LEAST_ITERATIONS = 10
"""a schedule of fewer steps is none"""
MEGATRONS_STD, LEAST_STD = 0.02, 0.25
"""`--init-method-std` without a flag; the part of 1/sqrt(hidden size) below which a std is small"""
_SHARED = (
    "lr",
    "weight_decay",
    "clip_grad",
    "batch_size",
    "init_method_std",
    "z_loss",
    "router_z_loss",
    batch_ramp.KEY,
)
_OF_ADAM = ("beta1", "beta2", "eps")
_SCHEDULE_RANGES = {
    "warmup": Range(0, 2**31),
    "decay": Range(0, 1),
    "min_lr_ratio": Range(0, 1),
}


def check_study(study: Study) -> None:
    """Refuse budgets that are no training, and names and values that the job would refuse; raises UserError.

    With an executor's own `command:` the optimizers are that program's, and only budgets are looked at.
    """
    _check_budgets(study)
    if study.cluster is not None:
        _check_cluster(study.cluster, study)
    if study.executor.command is not None:
        return
    lines = _Lines(study)
    for space in study.optimizers.values():
        _check_space(space, lines)
        _check_models(space, study, lines)


def note_small_weights(study: Study) -> str | None:
    """A sentence on models whose weights start far below 1/sqrt(hidden size), for optimizers that set no `init_method_std`.

    Seen at a width of 64 after 377 thousand tokens: from 0.02 AdamW's best loss is 3.72, Muon's 3.31 and SOAP's 3.19, from
    0.125 they are 3.58, 3.39 and 3.49 (docs/study.md).
    """
    if all("init_method_std" in {**space.start, **space.grid} for space in study.optimizers.values()):
        return None
    narrow = []
    for name, model in study.models.items():
        std = float(model.every_flag.get("init_method_std", MEGATRONS_STD))
        if std * math.sqrt(model.shape["hidden_size"]) < LEAST_STD:
            narrow.append((name, std))
    if not narrow:
        return None
    return (
        f"{', '.join(name for name, _ in narrow)}: weights start with a std of {narrow[0][1]:g}, less than a fourth of "
        "1/sqrt(hidden size), and short runs may end before some optimizers have left the start; compare "
        "`flags: {init_method_std: …}` of 1/sqrt(hidden size)"
    )


class _Lines:
    """Lines of the study file, for messages."""

    def __init__(self, study: Study):
        self._path, self._top = study.path, load(study.path)

    def error(self, name: str, key: str | None, message: str) -> UserError:
        entry = self._top["optimizers"][name]
        line = self._top["optimizers"].lines[name]
        for part in (entry.get("grid"), entry.get("start"), self._top.get("defaults")):
            if key is not None and isinstance(part, LocatedDict) and key in part:
                line = part.lines[key]
                break
        return UserError(f"{self._path}:{line}: optimizer `{name}`: {message}")


def _check_cluster(name: str, study: Study) -> None:
    try:
        cluster.load(name)
    except UserError as error:
        line = load(study.path)["target"].lines["cluster"]
        raise UserError(f"{study.path}:{line}: `cluster: {name}`: {error}") from None


def _check_budgets(study: Study) -> None:
    proxies = (phase.proxy for phase in study.phases if phase.proxy is not None)
    regimes = dict.fromkeys([*(regime for phase in study.phases for regime in phase.regimes), *proxies])
    for regime in regimes:
        for space in study.optimizers.values():
            batch = max(int(v) for v in [space.start["batch_size"], *space.grid.get("batch_size", ())])
            _check_budget(study, regime, space.name, batch)


def _check_budget(study: Study, regime: Regime, name: str, batch: int) -> None:
    iterations = study.tokens(regime) / (study.sequence_length * batch)
    if iterations < LEAST_ITERATIONS:
        raise UserError(
            f"{study.path}: {regime} is {study.tokens(regime):,.0f} tokens, {iterations:.2g} batches of "
            f"{batch} × {study.sequence_length} for {name}; raise the ratio (at least {LEAST_ITERATIONS} batches), or "
            "lower `batch_size:` or `sequence_length:`"
        )


def _check_space(space: OptimizerSpace, lines: _Lines) -> None:
    optimizers = registry.optimizers()
    if space.optimizer not in (*optimizers, *OF_MEGATRON):
        hint = nearest_or_all(space.optimizer, [*optimizers, *OF_MEGATRON])
        raise lines.error(space.name, None, f"there is no optimizer {space.optimizer!r}; {hint}")
    own, known = _own(space.optimizer), _known(space.optimizer)
    given = [(key, value) for key, values in space.grid.items() for value in values] + list(space.start.items())
    for key, value in given:
        if key not in known:
            raise lines.error(space.name, key, f"no hyperparameter `{key}`; {nearest_or_all(key, known)}")
        if key in own:
            options = {k: v for k, v in (space.start | {key: value}).items() if k in own}
            try:
                registry.build(space.optimizer, options)
            except UserError as error:
                raise lines.error(space.name, key, f"`{key}: {value}`: {error}") from None
        else:
            _check_number(space, key, value, lines)


def _check_models(space: OptimizerSpace, study: Study, lines: _Lines) -> None:
    """Values that only some models and runs have a use for."""
    given = {**space.grid, **space.start}
    experts = "router_z_loss" in given
    dense = [name for name, model in study.models.items() if experts and not model.spec.experts]
    if dense:
        raise lines.error(
            space.name,
            "router_z_loss",
            f"`router_z_loss` is of the routers of experts, and {dense[0]} has none; `z_loss` is that of the output logits",
        )
    mine = [phase for phase in study.phases if not phase.optimizers or space.name in phase.optimizers]
    repeated = [regime for phase in mine for regime in phase.regimes if regime.epochs > 1]
    if batch_ramp.KEY in given and repeated:
        raise lines.error(
            space.name,
            batch_ramp.KEY,
            f"`batch_ramp` does not go with {repeated[0]}, whose epochs are whole numbers of steps",
        )


def _check_number(space: OptimizerSpace, key: str, value: Any, lines: _Lines) -> None:
    if key == "schedule":
        if value not in SCHEDULES:
            raise lines.error(space.name, key, f"`schedule: {value}`: {nearest_or_all(str(value), SCHEDULES)}")
        return
    if key == batch_ramp.KEY:
        for batch in {space.start["batch_size"], *space.grid.get("batch_size", ())}:
            try:
                batch_ramp.parse(value, int(batch))
            except UserError as error:
                raise lines.error(space.name, key, f"`batch_ramp: {value}`: {error}") from None
        return
    flag = "scalar-lr-ratio" if key == "scalar_lr_ratio" else flag_of(space.optimizer, key)
    limits = _SCHEDULE_RANGES.get(key) or RANGES.get(flag, Range())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise lines.error(space.name, key, f"`{key}: {value}` must be a number")
    if not math.isfinite(value) or not limits.holds(value):
        raise lines.error(space.name, key, f"`{key}: {value}` must be {limits.said(value) or 'a finite number'}")


def _own(optimizer: str) -> set[str]:
    """Options of the optimizer that the study sets by its own flags."""
    if optimizer in OF_MEGATRON:
        return set()
    names = {field.name for field in fields(registry.known(optimizer).Config)}
    return {name for name in names if flag_of(optimizer, name) == f"{optimizer}-{name}".replace("_", "-")}


def _known(optimizer: str) -> list[str]:
    """Every hyperparameter that has an effect with this optimizer."""
    if optimizer in OF_MEGATRON:
        return [*FLAGS, *SCHEDULE]
    optimizer_class = registry.known(optimizer)
    configs = [optimizer_class.Config] + (
        [registry.known(optimizer_class.scalars.optimizer).Config] if optimizer_class.scalars else []
    )
    fields_of_all = {field.name for config in configs for field in fields(config)}
    scaled = ["scalar_lr_ratio"] if optimizer_class.scalars else []
    return [*_SHARED, *(k for k in _OF_ADAM if k in fields_of_all), *SCHEDULE, *scaled, *sorted(_own(optimizer))]
