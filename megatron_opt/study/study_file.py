"""Reads and validates a study file; every message names the line of the mistake."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_opt.errors import UserError, nearest_or_all
from megatron_opt.study import models as model_shapes
from megatron_opt.study.grids import default_space
from megatron_opt.study.hyperparameters import PAPER_GRIDS, PAPER_STARTS
from megatron_opt.study.models import SHAPE_KEYS, Model
from megatron_opt.study.phase_list import read_phases
from megatron_opt.study.spec import Data, Evaluation, ExecutorSettings, OptimizerSpace, Study
from megatron_opt.study.yaml_lines import Reader, load


def read_study(path: str | os.PathLike) -> Study:
    """Read and validate a study file; raises UserError with the line of the mistake."""
    path = Path(path)
    top = Reader(load(path), path, "the study file")
    name = top.text("name", path.stem)
    flags = top.pairs("flags")
    models = _models(top, flags)
    optimizers = _optimizers(top)
    baseline = top.text("baseline", "adamw" if "adamw" in optimizers else None)
    if baseline not in optimizers:
        raise top.error(
            f"the baseline {baseline or 'adamw'!r} is not among `optimizers:` ({', '.join(optimizers)}); "
            "add it, or name another with `baseline:`",
            "baseline",
        )
    ratios = tuple(float(r) for r in top.numbers("ratios", [1], above=0))
    epochs = top.numbers("epochs", [1], above=0)
    if any(isinstance(one, float) for one in epochs) or len(set(epochs)) < len(epochs):
        raise top.error("`epochs:` must be different whole numbers", "epochs")
    thresholds = top.section("thresholds")
    adopt = thresholds.number("adopt", 3e-3, least=0)
    insensitive = thresholds.number("insensitive", 6.4e-3, least=0)
    thresholds.finish()
    target = top.section("target")
    target_n = float(target.number("parameters", 7e9, above=0))
    target_ratios = tuple(float(r) for r in target.numbers("ratios", [1, 2, 4, 8, 16], above=0))
    cluster = target.text("cluster")
    if cluster is not None and Path(cluster).suffix in (".yaml", ".yml"):
        cluster = _path(target, "cluster", cluster)
    target.finish()
    budget = top.section("budget")
    max_hours = budget.number("hours", None, above=0)
    max_runs = budget.number("runs", None, above=0, whole=True)
    budget.finish()
    seeds, checkpoints = _seeds(top), top.number("checkpoints", 4, least=0, whole=True)
    study = Study(
        path=path,
        name=name,
        baseline=baseline,
        models=models,
        data=_data(top),
        optimizers=optimizers,
        sequence_length=top.number("sequence_length", required=True, above=0, whole=True),
        tokens_per_parameter=float(top.number("tokens_per_parameter", 20, above=0)),
        ratios=ratios,
        epochs=tuple(epochs),
        seeds=seeds,
        phases=read_phases(top, models, tuple(optimizers), ratios, tuple(epochs), len(seeds) > 1),
        adopt=adopt,
        insensitive=insensitive,
        equal_effort=top.choice("effort", ("equal", "free"), "equal") == "equal",
        executor=_executor(top),
        max_hours=max_hours,
        max_runs=max_runs,
        flags=flags,
        target=(target_n, target_ratios),
        cluster=cluster,
        eval_points=top.number("eval_points", 10, above=0, whole=True),
        checkpoints=checkpoints,
        evaluation=_evaluation(top, checkpoints, "ema_decay" in flags, models),
        sample=top.text("sample"),
    )
    top.take("defaults")
    top.finish()
    _check_effort(study, top)
    if study.evaluation and not study.checkpoints:
        raise top.error(
            "`eval:` reads a run's last checkpoint and `checkpoints: 0` writes none; give at least 1", "eval"
        )
    return study


def _models(top: Reader, shared: dict[str, Any]) -> dict[str, Model]:
    reader = top.nested("models", required=True)
    assert reader is not None
    models = {}
    for name in reader.mapping:
        entry = reader.nested(name, f"model `{name}`")
        if entry is None:
            raise reader.error(f"model `{name}` is empty; give a `preset:` or a shape", name)
        if "@" in name:
            raise reader.error(f"model name `{name}` must not contain `@`", name)
        preset = entry.text("preset", model_shapes.ARCHITECTURE)
        known = {}
        if preset == "none":
            preset = None
        else:
            try:
                known = model_shapes.preset_flags(preset)
            except UserError as error:
                raise entry.error(str(error), "preset") from None
        given = {key: entry.number(key, None, above=0, whole=True) for key in SHAPE_KEYS}
        if preset is not None and not known.get("ffn_hidden_size") and known.get("hidden_size"):
            known["ffn_hidden_size"] = 4 * known["hidden_size"]  # Megatron's default
        shape: dict[str, int] = {key: value or known.get(key, 0) for key, value in given.items()}
        missing = [key for key, value in shape.items() if not value]
        if missing:
            raise entry.error(f"model `{name}` lacks {', '.join(missing)}; give a preset or the whole shape")
        if shape["hidden_size"] % shape["num_attention_heads"]:
            raise entry.error("hidden_size is not a multiple of num_attention_heads", "hidden_size")
        models[name] = Model(
            name,
            preset,
            shape,
            flags=entry.pairs("flags"),
            gated=entry.flag("gated", bool(known.get("swiglu", False))),
            parameters=entry.number("non_embedding_parameters", None, above=0, whole=True),
            shared_flags=shared,
        )
        try:
            _ = models[name].non_embedding_parameters
        except UserError as error:
            raise entry.error(f"model `{name}`: {error} Or give `non_embedding_parameters:`", "flags") from None
        entry.finish()
    if not models:
        raise top.error("`models:` is empty; name at least one", "models")
    return models


def _optimizers(top: Reader) -> dict[str, OptimizerSpace]:
    reader = top.nested("optimizers", required=True)
    assert reader is not None
    defaults = top.mapping.get("defaults") or {}
    if not isinstance(defaults, dict):
        raise top.error("`defaults:` must be a mapping of hyperparameters", "defaults")
    spaces = {}
    for name in reader.mapping:
        entry = reader.nested(name, f"optimizer `{name}`")
        if entry is None:
            raise reader.error(f"optimizer `{name}` is empty; give it a `grid:` (or `grid: default`)", name)
        optimizer = entry.text("optimizer", name)
        start = entry.pairs("start")
        grid, start_of_grid = _grid(entry, name, optimizer)
        entry.finish()
        start = start_of_grid | dict(defaults) | start
        start = {key: values[0] for key, values in grid.items() if key not in start} | start
        if "lr" not in start:
            raise entry.error(f"optimizer `{name}` has no learning rate; give `lr` in its grid or start")
        if "batch_size" not in start:
            raise entry.error(f"optimizer `{name}` has no batch_size; give it in `defaults:`, start or grid")
        _check_values(entry, name, start, grid)
        spaces[name] = OptimizerSpace(name, optimizer, start, grid)
    if not spaces:
        raise top.error("`optimizers:` is empty; name at least two", "optimizers")
    return spaces


def _grid(entry: Reader, name: str, optimizer: str) -> tuple[dict[str, tuple], dict[str, Any]]:
    raw = entry.take("grid", None)
    if raw == "paper":
        if optimizer not in PAPER_GRIDS:
            raise entry.error(f"the paper has no grid for {optimizer!r}; it has {', '.join(PAPER_GRIDS)}", "grid")
        return {key: tuple(values) for key, values in PAPER_GRIDS[optimizer].items()}, PAPER_STARTS[optimizer]
    if raw == "default":
        space = default_space(optimizer)
        if space is None:
            raise entry.error(f"there is no default grid for {optimizer!r}; write one", "grid")
        return {key: tuple(values) for key, values in space[0].items()}, space[1]
    if raw is None:
        return {}, {}
    reader = Reader(raw, entry.path, f"the grid of `{name}`", entry.line_of("grid"))
    grid = {}
    for key in reader.mapping:
        values = reader.items(key)
        if not values:
            raise reader.error(f"the grid of `{name}` has nothing for `{key}`; list at least one value", key)
        if len(set(map(repr, values))) < len(values):
            raise reader.error(f"the grid of `{name}` repeats a value of `{key}`", key)
        grid[key] = tuple(values)
    if not grid:
        raise entry.error(f"the grid of `{name}` is empty; list at least one hyperparameter", "grid")
    return grid, {}


def _check_values(entry: Reader, name: str, start: dict[str, Any], grid: dict[str, tuple]) -> None:
    everything = [(key, value) for key, values in grid.items() for value in values] + list(start.items())
    for key, value in everything:
        if isinstance(value, (dict, list)) or value is None:
            raise entry.error(f"optimizer `{name}`: `{key}` must be one number, word or boolean", "grid")
        if key in ("lr", "batch_size") and (isinstance(value, (str, bool)) or not value > 0):
            raise entry.error(f"optimizer `{name}`: `{key}: {value}` must be a number greater than 0", "grid")
        if key == "batch_size" and value != int(value):
            raise entry.error(f"optimizer `{name}`: `batch_size: {value}` must be a whole number", "grid")


def _data(top: Reader) -> Data:
    reader = top.nested("data", required=True)
    assert reader is not None

    def paths(key: str) -> tuple[str, ...]:
        return tuple(_path(reader, key, str(item)) for item in reader.items(key) or [])

    train, valid, path = paths("train"), paths("valid"), paths("path")
    if bool(path) == bool(train):
        raise reader.error("`data:` needs either `train:` and `valid:` or `path:` with an optional `split:`")
    if train and not valid:
        raise reader.error("`data:` has `train:` but no `valid:`; final losses come from the validation data")
    data = Data(
        tokenizer=_path(reader, "tokenizer", reader.text("tokenizer", required=True)),
        tokenizer_type=reader.text("tokenizer_type", "SentencePieceTokenizer"),
        train=train,
        valid=valid,
        path=path,
        split=reader.text("split"),
        vocabulary=reader.number("vocabulary", None, above=0, whole=True),
    )
    reader.finish()
    return data


def _path(reader: Reader, key: str, text: str) -> str:
    """Environment variables expanded; a relative path starts at the study file's folder.

    One that begins with a variable or `~` is the caller's, and starts at the current folder.
    """
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise reader.error(f"`{key}: {text}` names an environment variable that is not set; export it", key)
    if text.startswith(("$", "~")):
        return os.path.abspath(expanded)
    return os.path.normpath(reader.path.resolve().parent / expanded)


def _seeds(top: Reader) -> tuple[int, ...]:
    seeds = top.numbers("seeds", [1])
    if any(isinstance(seed, float) for seed in seeds) or len(set(seeds)) < len(seeds):
        raise top.error("`seeds:` must be different whole numbers", "seeds")
    return tuple(seeds)


def _executor(top: Reader) -> ExecutorSettings:
    reader = top.nested("executor")
    if reader is None:
        return ExecutorSettings()
    command = reader.items("command")
    if command is not None:
        command = tuple(map(str, command)) if len(command) > 1 else tuple(str(command[0]).split())
    settings = ExecutorSettings(
        kind=reader.choice("kind", ("local", "slurm"), "local"),
        jobs=reader.number("jobs", None, above=0, whole=True),
        ranks=reader.number("ranks", 1, above=0, whole=True),
        nodes=reader.number("nodes", 1, above=0, whole=True),
        retries=reader.number("retries", 2, least=0, whole=True),
        preemptions=reader.number("preemptions", 100, least=0, whole=True),
        timeout_minutes=reader.number("timeout_minutes", None, above=0),
        command=command,
        environment={key: str(value) for key, value in reader.pairs("environment").items()},
        slurm=reader.pairs("slurm"),
        flops_per_s=reader.number("flops_per_s", None, above=0),
    )
    if settings.slurm and settings.kind != "slurm":
        raise reader.error("`slurm:` is given but `kind:` is local; set `kind: slurm`", "slurm")
    reader.finish()
    return settings


def _evaluation(top: Reader, checkpoints: int, decays: bool, models: Collection[str]) -> Evaluation | None:
    reader = top.nested("eval")
    if reader is None:
        return None
    folder = reader.text("tasks_path")
    evaluation = Evaluation(
        tasks=tuple(map(str, reader.items("tasks", required=True))),
        tasks_path=_path(reader, "tasks_path", folder) if folder else None,
        num_fewshot=reader.number("num_fewshot", None, least=0, whole=True),
        limit=reader.number("limit", None, above=0, whole=True),
        batch_size=reader.number("batch_size", 16, above=0, whole=True),
        average=reader.number("average", None, least=2, whole=True),
        ema=reader.flag("ema", False),
        models=tuple(map(str, reader.items("models") or ())),
    )
    reader.finish()
    for name in evaluation.models:
        if name not in models:
            raise reader.error(f"no model `{name}`; {nearest_or_all(name, models)}", "models")
    if evaluation.ema and not decays:
        raise reader.error("`ema:` wants runs that keep a moving average; add `ema_decay` to `flags:`", "ema")
    if evaluation.average and not (checkpoints or 0) >= evaluation.average:
        raise reader.error(
            f"`average: {evaluation.average}` wants as many checkpoints and a run writes `checkpoints: {checkpoints}`",
            "average",
        )
    return evaluation


def _check_effort(study: Study, top: Reader) -> None:
    """A full grid gives every optimizer the same number of runs, or the file says `effort: free`."""
    if not study.equal_effort or not any(phase.kind == "grid" for phase in study.phases):
        return
    counts = {name: len(space.points()) for name, space in study.optimizers.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise top.error(
            f"unequal tuning effort: runs in each regime are {shown}; make the grids equally large, "
            "or accept it with `effort: free`",
            "optimizers",
        )
