"""A change of optimizer, worked out: cost on the cluster, gain by the evidence, wall-clock, what is refused."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.search import SearchResult, search
from megatron_opt.cost_model.step import Step, predict
from megatron_opt.errors import UserError
from megatron_opt.migrate.evidence import TOKENS_PER_PARAMETER, Evidence, gather, hyperparameter_flags
from megatron_opt.study.fits.statement import Estimate


@dataclass
class Plan:
    """Everything that the report says."""

    source: str
    target: str
    cluster: Cluster
    gpus: int
    tokens: float
    done: float  # share of the budget that is spent
    before: Step
    after: Step
    evidence: Evidence
    flags: dict[str, Any]
    given: Mapping[str, Any]
    refused: list[str] = field(default_factory=list)
    layouts: SearchResult | None = None  # a search, where the target does not fit into the present layout

    @property
    def ratio(self) -> float:
        """Step time after over before."""
        return self.after.seconds / self.before.seconds

    @property
    def token_speedup(self) -> Estimate:
        """Over the evidence's counted methods."""
        return self.evidence.combined()

    @property
    def speedup(self) -> Estimate:
        """Wall-clock: token speedup over the ratio of step times."""
        return self.token_speedup.over(self.ratio)

    @property
    def chance(self) -> float:
        """Probability that the change saves time."""
        return self.evidence.chance(self.ratio)

    @property
    def fits(self) -> bool:
        """Whether the target fits into memory in the present layout."""
        return self.after.memory.total <= self.cluster.memory

    @property
    def chinchilla(self) -> float:
        """Tokens over 20 per non-embedding parameter."""
        return self.tokens / (TOKENS_PER_PARAMETER * self.before.model.hidden_parameters)

    @property
    def hours(self) -> float:
        """GPU-hours that the rest of the run takes as it is."""
        return self.tokens * (1 - self.done) / self.before.tokens_per_second * self.gpus / 3600

    def saved(self, speedup: float) -> float:
        """GPU-hours saved (negative: lost) for the same loss."""
        return self.hours * (1 - 1 / speedup) if speedup > 0 else -math.inf

    @property
    def extrapolates(self) -> list[str]:
        """How far the run lies outside the evidence, in sentences; empty inside."""
        n, sentences = float(self.before.model.hidden_parameters), []
        low, high = self.evidence.sizes
        if n > 1.05 * high or n < low / 1.05:
            side = f"{n / high:.1f} times the largest" if n > high else f"{low / n:.1f} times below the smallest"
            sentences.append(f"extrapolation: {n / 1e9:.3g}B non-embedding parameters are {side} measured size")
        low, high = self.evidence.budgets
        if self.chinchilla > 1.05 * high or self.chinchilla < low / 1.05:
            sentences.append(
                f"extrapolation: {self.chinchilla:.2g}x Chinchilla tokens lie outside the measured {low:.2g}x to "
                f"{high:.2g}x"
            )
        return sentences


def budget(flags: Mapping[str, Any], tokens: float | None, ratio: float | None, n: float) -> float:
    """Tokens of the run: given, or a multiple of 20 per parameter, or from the run's own iterations."""
    if tokens is not None and ratio is not None:
        raise UserError("give --tokens or --chinchilla, not both.")
    for name, value in (("--tokens", tokens), ("--chinchilla", ratio)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} is {value}; it must be greater than 0.")
    if tokens is not None:
        return tokens
    if ratio is not None:
        return ratio * TOKENS_PER_PARAMETER * n
    if flags.get("train-iters") and flags.get("global-batch-size"):
        return float(flags["train-iters"]) * flags["global-batch-size"] * flags["seq-length"]
    if flags.get("train-samples"):
        return float(flags["train-samples"]) * flags["seq-length"]
    raise UserError("the run's length is unknown; give --tokens, --chinchilla, or --train-iters.")


def make_plan(
    flags: Mapping[str, Any],
    raw: Mapping[str, Any],
    target: str,
    cluster: Cluster,
    gpus: int,
    *,
    study: str | None = None,
    tokens: float | None = None,
    ratio: float | None = None,
    done: float = 0.0,
) -> Plan:
    """Work out a migration; raises UserError for flags that cannot be planned."""
    if not 0 <= done < 1:
        raise UserError(f"--done is {done}; it is the share of the budget that is spent, from 0 to below 1.")
    source = {"adam": "adamw"}.get(str(flags.get("optimizer", "adamw")), str(flags.get("optimizer", "adamw")))
    before = predict({**flags, "optimizer": source}, cluster, gpus)
    if before.memory.total > cluster.memory:
        raise UserError(
            f"the run as given needs {before.memory.total / 1e9:.0f} GB on a GPU of {cluster.memory / 1e9:.0f} GB; "
            "give the layout it is trained with, or find one by `megatron-opt cost search`."
        )
    n = float(before.model.hidden_parameters)
    d = budget(flags, tokens, ratio, n)
    if not 1e-3 <= d / (TOKENS_PER_PARAMETER * n) <= 1e4:
        raise UserError(f"{d:.3g} tokens for {n:.3g} parameters is no training run; check --tokens.")
    evidence = gather(study, source, target, n, d)
    steps = max(1, round(d * (1 - done) / before.tokens))
    wanted = hyperparameter_flags(target, evidence.hyperparameters, steps)
    after_flags = {**_without_optimizers(flags), **{k: v for k, v in wanted.items() if k not in ("global-batch-size",)}}
    after = predict(after_flags, cluster, gpus)
    plan = Plan(source, target, cluster, gpus, d, done, before, after, evidence, wanted, flags, refusals(raw, target))
    if not plan.fits:
        plan.layouts = search(after_flags, cluster, gpus, top=3)
    return plan


def _without_optimizers(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of model, layout and batch."""
    from megatron_opt.cost_model.flags import options

    owned = {f"{optimizer}-{name}".replace("_", "-") for optimizer, given in options(flags).items() for name in given}
    dropped = owned | {"optimizer", "adam-beta1", "adam-beta2", "adam-eps", "scalar-lr-ratio", "optimizer-groups"}
    return {key: value for key, value in flags.items() if key not in dropped}


def refusals(raw: Mapping[str, Any], target: str) -> list[str]:
    """What the job would refuse with these flags and the target, one sentence a flag."""
    from megatron_opt.training.optimizer_flags import refused_flags

    return refused_flags({key.replace("_", "-"): value for key, value in raw.items()}, target)


def command(plan: Plan) -> str:
    """The flags to change, as a command line."""
    words: Sequence[str] = [
        f"--{key}" if value is True else f"--{key} {value}" for key, value in plan.flags.items() if value is not False
    ]
    return " \\\n  ".join(words)
