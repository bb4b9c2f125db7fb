"""One training run of a study: its configuration, its identity, its command line."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_opt.study import batch_ramp
from megatron_opt.study.hyperparameters import SCHEDULE, flag_of, schedule_flags
from megatron_opt.study.models import Model
from megatron_opt.study.spec import MUP, Regime, Study


@dataclass(frozen=True)
class Run:
    """A run that is wanted: what it trains and the flags that say so."""

    optimizer: str
    """the name of the entry in the study file"""
    regime: Regime
    hyper: dict[str, Any]
    seed: int
    config: dict[str, Any]
    """everything that decides the result; its hash is the run's identity"""
    surroundings: dict[str, Any]
    """flags that change where or how often, not what: paths, evaluation interval, micro-batch"""

    @cached_property
    def id(self) -> str:
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        flags = self.config["flags"]
        samples = flags.get("train-samples") or flags["train-iters"] * flags["global-batch-size"]
        return int(samples * flags["seq-length"])

    @property
    def arguments(self) -> list[str]:
        return argument_list(self.config["flags"] | self.surroundings)


def make_run(study: Study, optimizer: str, regime: Regime, hyper: dict[str, Any], seed: int) -> Run:
    """The run of one optimizer with the given hyperparameters in a regime.

    Iterations = tokens // (sequence · batch), at least one, so that every optimizer sees the same budget; of several epochs
    a multiple, so that each is whole.
    """
    space, model, data = study.optimizers[optimizer], study.models[regime.model], study.data
    batch = int(hyper["batch_size"])
    iterations = max(1, int(study.tokens(regime) // (study.sequence_length * batch * regime.epochs))) * regime.epochs
    extra = {key.replace("_", "-"): value for key, value in (study.flags | model.flags).items()}
    flags: dict[str, Any] = {"preset": model.preset} if model.preset else {}
    flags |= {key.replace("_", "-"): value for key, value in model.shape.items()}
    flags |= {
        "seq-length": study.sequence_length,
        "max-position-embeddings": study.sequence_length,
        "train-iters": iterations,
        "seed": seed,
        "optimizer": space.optimizer,
    }
    flags |= extra
    if "eval-iters" in flags and not {"eval-samples", "full-validation"} & set(flags):  # one set for every batch size
        flags["eval-samples"] = int(flags.pop("eval-iters")) * int(study.optimizers[study.baseline].start["batch_size"])
    apart = (*SCHEDULE, MUP, batch_ramp.KEY)
    flags |= {flag_of(space.optimizer, key): value for key, value in hyper.items() if key not in apart}
    if MUP in hyper:
        flags |= mup_flags(study.models[hyper[MUP]])
    flags["global-batch-size"] = batch
    if batch_ramp.KEY in hyper:
        ramp = batch_ramp.ramp_of(hyper[batch_ramp.KEY], batch, iterations * batch)
        flags = {key: value for key, value in flags.items() if key not in ("global-batch-size", "train-iters")}
        flags |= ramp.flags(study.sequence_length) | schedule_flags(space.optimizer, hyper, ramp.samples, batch)
        iterations = ramp.iterations
    else:
        flags |= schedule_flags(space.optimizer, hyper, iterations)
    if regime.epochs > 1:
        flags["train-epochs"] = regime.epochs

    surroundings: dict[str, Any] = {
        "tokenizer-type": data.tokenizer_type,
        "tokenizer-model": data.tokenizer,
        "eval-interval": max(1, iterations // study.eval_points),
        "micro-batch-size": _micro_batch(study, _least_batch(hyper, batch), extra),
        "save-interval": max(1, iterations // study.checkpoints) if study.checkpoints else None,
        "exit-signal-handler": True,
    }
    if (
        regime.epochs == 1 and study.repeats
    ):  # what is called unique is; no part of the identity, as it changes no number
        surroundings["train-epochs"] = 1
    surroundings |= {key: flags.pop(key) for key in list(surroundings) if key in flags}
    if data.path:
        surroundings |= {"data-path": list(data.path)} | ({"split": data.split} if data.split else {})
    else:
        surroundings |= {"train-data-path": list(data.train), "valid-data-path": list(data.valid)}
    config = {
        "entry": optimizer,
        "model": regime.model,
        "ratio": regime.ratio,
        "hyper": hyper,
        "seed": seed,
        "data": [os.path.basename(prefix) for prefix in data.path or data.train + data.valid],
        "flags": flags,
    }
    if regime.epochs > 1:  # else runs of earlier studies would have another identity
        config["epochs"] = regime.epochs
    return Run(optimizer, regime, hyper, seed, config, surroundings)


def mup_flags(base: Model) -> dict[str, Any]:
    """Megatron's µP flags with `base` as the model that was tuned; at its own width they change nothing."""
    width, heads = base.shape["hidden_size"], base.shape["num_attention_heads"]
    return {"use-mup": True, "mup-base-hidden-size": width, "mup-base-head-dim": width // heads}


def _least_batch(hyper: dict[str, Any], batch: int) -> int:
    return batch_ramp.parse(hyper[batch_ramp.KEY], batch)[0][1] if batch_ramp.KEY in hyper else batch


def _micro_batch(study: Study, batch: int, flags: dict[str, Any]) -> int:
    """The largest micro-batch up to 16 that divides one data-parallel rank's share of the batch."""
    split = flags.get("tensor-model-parallel-size", 1) * flags.get("pipeline-model-parallel-size", 1)
    share = max(1, batch // max(1, study.executor.ranks * study.executor.nodes // split))
    return next(size for size in range(min(16, share), 0, -1) if share % size == 0)


def argument_list(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line: true → the bare flag, false or null → left out, a list → several words."""
    words: list[str] = []
    for flag, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{flag}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words
