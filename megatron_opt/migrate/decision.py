"""Whether to measure before deciding: value of information, in GPU-hours, with experiments that could change the answer."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from megatron_opt.migrate.evidence import TOKENS_PER_PARAMETER
from megatron_opt.migrate.plan import Plan

RUNS = 4  # both optimizers, two learning rates each
PILOT = 0.02  # share of the budget of a pilot of the recipe itself
LEAST_NOISE = 0.03  # of a measured log speedup: two seeds and a grid of learning rates
TELLS = 0.01  # chance of changing the decision below which an experiment settles nothing


@dataclass(frozen=True)
class Experiment:
    """Runs of both optimizers; hours are GPU-hours. `known` is the share of the log speedup's variance they take away."""

    words: str
    hours: float
    known: float
    saving: float  # expected, deciding after it
    changes: float  # probability that the decision is another one after it
    value: float  # `saving` less that of deciding now, less the price


@dataclass(frozen=True)
class Decision:
    """The choice without more evidence, what perfect knowledge would add, and experiments that tell something."""

    switch: bool
    expected: float  # GPU-hours saved by switching now; negative: lost
    perfect: float  # GPU-hours that certainty would be worth
    experiments: list[Experiment]

    @property
    def best(self) -> Experiment | None:
        """The experiment whose worth exceeds its price by most; None where none pays."""
        paying = [item for item in self.experiments if item.value > 0]
        return max(paying, key=lambda item: item.value, default=None)


def decide(plan: Plan) -> Decision:
    """Value of information of a plan.

    The log of the wall-clock speedup y has the counted methods' draws, each method weighing the same; switching saves
    H·(1 − e^−y) of H GPU-hours. An experiment that takes away a share ρ of y's variance moves the posterior mean by
    N(0, ρσ²), so that the expected saving of deciding after it is H·(Φ(−d₂) − F·Φ(−d₁)) with F = E[e^−y],
    s = σ√ρ, d₁ = ln F / s + s/2, d₂ = d₁ − s (preposterior analysis; Raiffa and Schlaifer, 1961).
    """
    logs = [np.log(np.maximum(method.draws, 1e-9) / plan.ratio) for method in plan.evidence.methods if method.counted]
    kept = np.concatenate([np.quantile(draws, (np.arange(400) + 0.5) / 400) for draws in logs])
    cost, sigma = float(np.mean(np.exp(-kept))), max(float(np.std(kept)), 1e-6)
    expected = plan.hours * (1 - cost)
    perfect = plan.hours * float(np.mean(np.maximum(0.0, 1 - np.exp(-kept)))) - max(0.0, expected)
    designs = []
    for words, hours, signal in _designs(plan):
        known = (signal * sigma) ** 2 / ((signal * sigma) ** 2 + _noise(plan) ** 2)
        saving, changes = preposterior(cost, sigma, known)
        saving = min(saving * plan.hours, max(0.0, expected) + perfect)
        if changes >= TELLS:
            value = saving - max(0.0, expected) - hours
            designs.append(Experiment(words, hours, known, saving, changes, value))
    designs.sort(key=lambda item: -item.value)
    return Decision(expected > 0, expected, max(0.0, perfect), designs)


def preposterior(cost: float, sigma: float, known: float) -> tuple[float, float]:
    """Expected share saved when deciding after an experiment, and the chance that the decision is another one.

    `cost` is E[e^−y], `sigma` the standard deviation of y, `known` the share of its variance that is taken away.
    """
    s = sigma * math.sqrt(known)
    if s <= 0:
        return max(0.0, 1 - cost), 0.0
    upper = math.log(cost) / s + s / 2
    lower = upper - s
    saved = float(stats.norm.cdf(-lower) - cost * stats.norm.cdf(-upper))
    switches = float(stats.norm.cdf(-lower))  # the posterior expectation of e^−y is below 1
    return max(saved, 0.0, 1 - cost), 1 - switches if cost < 1 else switches


def _noise(plan: Plan) -> float:
    """Standard deviation of one measured log speedup as a sign of the same at another budget: over each size's cells."""
    by_size: dict[float, list[float]] = {}
    for cell in plan.evidence.cells:
        if math.isfinite(cell.value) and cell.value > 0:
            by_size.setdefault(cell.n, []).append(math.log(cell.value))
    squares = [float(np.var(values, ddof=1)) for values in by_size.values() if len(values) > 1]
    return max(LEAST_NOISE, math.sqrt(float(np.mean(squares))) if squares else 2 * LEAST_NOISE)


def _designs(plan: Plan) -> list[tuple[str, float, float]]:
    """(words, GPU-hours, signal) of experiments: ladders below the run's size, and a pilot of the recipe itself.

    Beyond the largest measured size the ways to extrapolate part linearly in log N, so runs at a size in between see
    ln(n/m) / ln(N/m) of the doubt about N.
    """
    n, most = float(plan.before.model.hidden_parameters), plan.evidence.sizes[1]
    whole = plan.hours / max(1e-9, 1 - plan.done)
    both = f"{plan.source} and {plan.target}, two learning rates each around the law's"
    designs = []
    size = n / 2
    while size > 1.2 * most:
        tokens = plan.chinchilla * TOKENS_PER_PARAMETER * size
        signal = math.log(size / most) / math.log(n / most)
        words = f"{both}, at {_count(size)} parameters and {_count(tokens)} tokens"
        designs.append((words, RUNS * whole * (size / n) ** 2, signal))
        size /= 2
    words = f"a pilot of this recipe: {both}, a schedule that ends at {PILOT:.0%} of the budget"
    designs.append((words, RUNS * PILOT * whole, 1.0))
    return designs


def _count(value: float) -> str:
    return f"{value / 1e9:.3g}B" if value >= 1e9 else f"{value / 1e6:.3g}M"
