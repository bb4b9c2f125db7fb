"""`Optimizer`: the engine behind torch's interface."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from megatron_opt.distributed.ownership import plan_table
from megatron_opt.distributed.shard_group import agree
from megatron_opt.distributed.sharded_optimizer import ShardedOptimizer
from megatron_opt.distributed.state import numbers_of
from megatron_opt.engine_options import EngineOptions
from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.groups import (
    Group,
    ParamGroupConfig,
    assign,
    default_group_configs,
    describe,
    load_group_configs,
    read_rules,
)
from megatron_opt.torch.build import build_source, check_groups, check_replicas
from megatron_opt.torch.checkpoint import entries, load_entries, whole_entries
from megatron_opt.torch.matrices import Declarer, Split, canonical_names, embeddings_of

Groups = str | Path | Sequence[ParamGroupConfig | Mapping[str, Any]]


class ArgumentError(UserError, ValueError):
    """Bad input to this module, as torch's users expect it."""


class Optimizer(torch.optim.Optimizer):
    """A registered optimizer by name, on a plain model, DistributedDataParallel, or DTensor parameters (fully_shard, TP).

    Hidden matrices are trained by the rule `name` with `config`, the fields of its configuration; embeddings, output
    layers, routers, norms and biases by its partner, as in a Megatron job. A step's update is that of a Megatron job with the
    same weights and gradients: each logical matrix is computed once, by its owner among the ranks.

    `params`: a model, or its `named_parameters()`; frozen ones are left out. `lr`, `weight_decay`: of every group, times its
    `lr_scale`, and where it decays; `param_groups` have both. `clip_grad`: the largest gradient norm, 0 for none, by the
    rule's own clipping groups. `partner`: options of the partner's configuration. `scalar_lr_ratio`: the partner's `lr_scale`.
    `groups`: instead of a name, rules as in a file of `--optimizer-groups` (or its path). `kinds`, `split`: see
    `matrices.Declarer`. `process_group`: the ranks that share the parameters, torch's default group where it is None.
    `overwrite_grads`: a step may leave directions in the gradients' memory, which saves a copy of it.

    Raises ArgumentError, a ValueError, for bad input, on every rank.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[tuple[str, Tensor]],
        name: str | None = None,
        *,
        lr: float,
        weight_decay: float = 0.0,
        clip_grad: float = 0.0,
        partner: Mapping[str, Any] | None = None,
        scalar_lr_ratio: float | None = None,
        groups: Groups | None = None,
        kinds: Mapping[str, str] | None = None,
        split: Mapping[str, Split] | None = None,
        engine: EngineOptions | None = None,
        process_group: Any = None,
        overwrite_grads: bool = False,
        **config: Any,
    ) -> None:
        options = engine or EngineOptions()
        with _as_arguments():
            for what, value in (("lr", lr), ("weight_decay", weight_decay), ("clip_grad", clip_grad)):
                _check_number(what, value)
            if options.split_heads:
                raise UserError("split_heads is for Megatron's layers; give split={pattern: {'q0': rows, …}}.")
            if options.ema_decay:
                raise UserError("ema_decay is for Megatron jobs; use torch.optim.swa_utils.AveragedModel.")
            if options.optimizer_cpu_offload:
                raise UserError("optimizer_cpu_offload is for Megatron jobs; use fully_shard's CPUOffloadPolicy.")
            optimizers = _rules(name, config, partner, scalar_lr_ratio, groups)
            embeddings = embeddings_of(params) if isinstance(params, nn.Module) else []
            named = _named(params)
            self._source = build_source(named, Declarer(kinds, split, embeddings), options, process_group)
            shard_group = self._source.shard_group
            made = assign([shard_group.infos[n] for n in sorted(shard_group.infos)], optimizers, options.decay_mode)
            check_groups(self._source, made)
            self._engine = ShardedOptimizer(
                [shard_group], made, options, clip_grad=float(clip_grad), world=shard_group.group
            )
            plan = self._engine.matrix_steps[0].placed.plan
            agree("optimizer's plan", f"{plan.digest()} {[g.name for g in made]}", shard_group.group, shard_group.size)
        for param_shard in shard_group.param_shards:
            param_shard.overwritten = not overwrite_grads and any(  # type: ignore[attr-defined]
                rect.matrix in self._engine.matrix_steps[0].infos for rect in param_shard.rects
            )
        self._curvature_of = 0  # the step after which the last estimate was made
        self._has_stepped = self._complete = False
        self.grad_norm: float | None = None  # of the last step's gradients, before clipping
        super().__init__(self._param_groups(made, lr, weight_decay), {"lr": lr, "weight_decay": weight_decay})
        self._complete = True
        self._given = [id(p) for group in self.param_groups for p in group["params"]]

    def _param_groups(self, groups: Sequence[Group], lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """torch's groups, one of each of the engine's; a parameter of several matrices is in the first one's."""
        group_of, params = self._engine.group_of, dict(self._source.named)
        members: list[list[tuple[str, Any]]] = [[] for _ in groups]
        for each in self._source.declared:
            members[group_of[each.infos[0].name]].append((each.name, params[each.name]))
        return [
            {
                "params": mine,
                "name": group.name,
                "optimizer": group.optimizer,
                "lr": lr,
                "lr_scale": group.lr_scale,
                "weight_decay": group.decay(float(weight_decay)),
                "step": 0,
            }
            for group, mine in zip(groups, members, strict=True)
        ]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are made with the optimizer alone, since they decide who computes what."""
        if self._complete:
            raise TypeError("groups cannot be added later; make a new optimizer of all parameters.")
        super().add_param_group(param_group)

    # The step

    _step_supports_amp_scaling = True  # so that a GradScaler hands its scale to `step`, which refuses it

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the parameters' gradients; a parameter without one is left as it is. Collective over the ranks.

        Returns what `closure` returned, if one was given.
        """
        if hasattr(self, "grad_scale") or hasattr(self, "found_inf"):
            self.__dict__.pop("grad_scale", None), self.__dict__.pop("found_inf", None)
            raise TypeError("a GradScaler has scaled the gradients; train in bf16 (torch.autocast), which needs none.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        with _as_arguments():
            self._follow()
            if not engine.step_number:
                engine.forget_states()  # a look at the state may have made it of other weights
            if not self._has_stepped:
                check_replicas(engine.shard_groups[0])
                self._has_stepped = True
            if engine.curvature_due(engine.step_number) and self._curvature_of != engine.step_number > 0:
                raise UserError(
                    f"after step {engine.step_number} the rule wants a curvature estimate; see update_curvature()."
                )
            self.grad_norm = engine.update()
        for group in self.param_groups:
            group["step"] = engine.step_number
        return loss

    def _follow(self) -> None:
        """See that parameters are those of the start, and take what changed since the last step from outside."""
        if [id(p) for group in self.param_groups for p in group["params"]] != self._given:
            raise UserError(
                "the parameters of param_groups are others than the optimizer was made of; make it after the model is wrapped "
                "(fully_shard, DistributedDataParallel, accelerate)."
            )
        self._engine.param_groups = self.param_groups
        for param_shard in self._engine.param_shards():
            param_shard.refresh()

    def curvature_due(self) -> bool:
        """Whether the rule (Sophia) wants a curvature estimate now, after the last step."""
        return self._engine.step_number > 0 and self._engine.curvature_due(self._engine.step_number)

    def update_curvature(self, scale: float, squared: bool) -> None:
        """Take the parameters' present gradients as a curvature estimate; drop them afterwards.

        Gauss–Newton–Bartlett: gradients of the mean loss on labels sampled from the model, `squared`, `scale` the number
        of labels. Hutchinson: z·(Hz) as gradients, not squared, scale 1.
        """
        self._engine.update_curvature(scale, squared)
        self._curvature_of = self._engine.step_number

    # State

    @property
    def state(self) -> Any:  # type: ignore[override]
        """By parameter: tensors of the state, whole or this rank's share (`checkpoint.py`). Collective before the first step."""
        if not self._complete:
            return {}
        with _as_arguments():
            if not self._engine.has_states:
                self._follow()
                self._engine.ensure_states()
            by_param = entries(self._engine, self._source.param_of)
        return {param: by_param.get(name, {}) for name, param in self._source.named}

    @state.setter
    def state(self, value: Any) -> None:
        """torch.optim.Optimizer begins with an empty one."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's; numbers of a whole rule (Prodigy's d) are in its groups."""
        for group, numbers in zip(self.param_groups, numbers_of(self._engine.group_optimizers), strict=True):
            if numbers:
                group["numbers"] = numbers
        return super().state_dict()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Meanwhile the parameters are those to evaluate and save for others: schedule-free's average. Collective."""
        with self._engine.evaluation.in_place(self._publish):
            yield

    def _publish(self) -> None:
        for param_shard in self._engine.param_shards():
            param_shard.publish()

    def full_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, with every tensor whole on the CPU, on every rank; collective. `load_state_dict` takes it anywhere."""
        content = self.state_dict()
        names = [name for name, _ in self._source.named]
        whole = whole_entries(self._engine, names, entries(self._engine, self._source.param_of))
        number = {
            name: at for group in content["param_groups"] for at, name in zip(group["params"], group["param_names"])
        }
        return {**content, "state": {number[name]: whole.get(name, {}) for name in names}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state: of `state_dict` on the same ranks, filled by torch.distributed.checkpoint on others, or whole.

        Learning rates, decay and whatever else the groups hold come with it. Raises ArgumentError where it is of other
        groups or another model.
        """
        saved = state_dict["param_groups"]
        with _as_arguments():
            if [g.get("name") for g in saved] != [g["name"] for g in self.param_groups] or any(
                len(theirs["params"]) != len(ours["params"]) for theirs, ours in zip(saved, self.param_groups)
            ):
                raise UserError(
                    f"the state to be loaded is of the groups {[g.get('name') for g in saved]} and this optimizer has "
                    f"{[g['name'] for g in self.param_groups]}; make it as the saved one was made."
                )
            key_of = {
                name: key
                for theirs, ours in zip(saved, self.param_groups)
                for key, name in zip(theirs["params"], ours.get("param_names", ()))
            }
            given = {name: state_dict["state"].get(key, {}) for name, key in key_of.items()}
            self._follow()
            self._engine.ensure_states()
            with torch.no_grad():
                load_entries(self._engine, self._source.param_of, given)
        for theirs, ours in zip(saved, self.param_groups):
            ours.update({key: value for key, value in theirs.items() if key not in ("params", "param_names")})
        for ours, optimizer in zip(self.param_groups, self._engine.group_optimizers, strict=True):
            if "numbers" in ours:
                optimizer.numbers = dict(ours["numbers"])
        self._engine.step_number = self._curvature_of = max(int(group["step"]) for group in self.param_groups)

    def __getstate__(self) -> NoReturn:
        raise TypeError("an optimizer is bound to its ranks' parameters: copy its state_dict() instead.")

    def describe(self) -> str:
        """A table of the groups: which optimizer trains what."""
        return describe(self._engine.groups)

    def plan(self) -> str:
        """A table of who computes what."""
        return plan_table(self._engine.matrix_steps[0].placed.plan)


def _named(params: Any) -> list[tuple[str, Any]]:
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    if isinstance(params, Tensor | Mapping) or not isinstance(params, Iterable):
        raise UserError("params is no list of (name, parameter); give model.named_parameters() or the model.")
    pairs = list(params)
    for item in pairs:
        if isinstance(item, dict):
            raise UserError("groups of parameters are given as rules (groups=…), over model.named_parameters().")
        if not isinstance(item, tuple) or len(item) != 2 or not isinstance(item[0], str):
            raise UserError(
                "parameters need names, which say what they are; give model.named_parameters() or the model."
            )
    named = [(name, param) for name, param in canonical_names(pairs) if getattr(param, "requires_grad", True)]
    if not named:
        raise UserError("there is no parameter to train: all are frozen, or the list is empty.")
    return named


def _rules(
    name: str | None,
    config: Mapping[str, Any],
    partner: Mapping[str, Any] | None,
    scalar_lr_ratio: float | None,
    groups: Groups | None,
) -> list[ParamGroupConfig]:
    if groups is not None:
        if name is not None or config or partner or scalar_lr_ratio is not None:
            raise UserError("groups name optimizers and their options themselves; leave out the name and its options.")
        if isinstance(groups, str | Path):
            return load_group_configs(groups)
        return [g if isinstance(g, ParamGroupConfig) else read_rules("groups", [g])[0] for g in groups]
    if name is None:
        raise UserError(f"give the name of an optimizer: {', '.join(sorted(registry.optimizers()))}; or groups.")
    scalars = registry.known(name).scalars
    if partner and scalars is None:
        raise UserError(f"{name} trains all parameters, so that it has no partner; give its options alone.")
    options = {name: registry.read_options(name, config)}
    if scalars is not None:
        options[scalars.optimizer] = registry.read_options(scalars.optimizer, partner or {})
    return default_group_configs(name, options, scalar_lr_ratio)


def _check_number(what: str, value: Any) -> None:
    number = float(value) if isinstance(value, int | float | Tensor) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"{what} is {value!r}; it must be a finite number, 0 or more.")


@contextlib.contextmanager
def _as_arguments() -> Iterator[None]:
    """Complaints of the engine, which name flags, as errors that name arguments."""
    try:
        yield
    except UserError as error:
        names = "|".join(sorted((n.replace("_", "-") for n in registry.optimizers()), key=len, reverse=True))
        sentence = re.sub(rf"--(?:(?:{names})-)?([a-z][\w-]*)", lambda match: match[1].replace("-", "_"), str(error))
        raise ArgumentError(sentence.replace("optimizer_groups", "groups")) from error
