"""What a study says of an optimizer at a size and budget: token speedup, hyperparameters, cliffs, next runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.hyper_laws import fit_hyper_law
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.speedups import Speedup, speedups
from megatron_opt.study.fits.statement import Estimate, predict
from megatron_opt.study.paper_data import paper_dataset
from megatron_opt.study.prediction import Evidence as Losses
from megatron_opt.study.prediction import load

TOKENS_PER_PARAMETER = 20.0
RESAMPLES = 200


@dataclass(frozen=True)
class Method:
    """One way to estimate a token speedup; `draws` are samples of it, `counted` whether the verdict uses it."""

    name: str
    estimate: Estimate
    draws: np.ndarray
    counted: bool
    note: str


@dataclass(frozen=True)
class Hyperparameter:
    """A value for the target run; `interval` where a law gives one, `source` says where it is from."""

    name: str
    value: Any
    low: float | None
    high: float | None
    source: str


@dataclass
class Evidence:
    """Everything that a plan takes from a study."""

    source: str
    attribution: str
    paper: bool
    sizes: tuple[float, float]
    budgets: tuple[float, float]  # D/N over TOKENS_PER_PARAMETER
    cells: list[Speedup]
    methods: list[Method]
    hyperparameters: list[Hyperparameter]
    source_lr: Hyperparameter | None
    cliff: tuple[float, float, str] | None  # tuned lr, lowest lr that is much worse or diverges, regime
    tuned_batch: float | None
    notes: list[str] = field(default_factory=list)

    def combined(self) -> Estimate:
        """Over the counted methods: geometric mean of their values, the widest of their intervals."""
        used = [method.estimate for method in self.methods if method.counted]
        value = math.exp(sum(math.log(item.value) for item in used) / len(used))
        return Estimate(value, min(item.low for item in used), max(item.high for item in used))

    def chance(self, threshold: float) -> float:
        """Probability that the token speedup exceeds a threshold, methods weighing the same."""
        return float(np.mean([np.mean(m.draws > threshold) for m in self.methods if m.counted]))


def gather(study: str | None, source: str, target: str, n: float, d: float) -> Evidence:
    """Evidence for changing from `source` to `target` at n non-embedding parameters and d tokens."""
    known = load(study)
    dataset, data, sigma, name = known.dataset, known.data, known.noise.sigma, known.name
    for optimizer in (source, target):
        if optimizer not in data.optimizers:
            raise UserError(
                f"{name} has no results of {optimizer}; it has {', '.join(data.optimizers)}. "
                "Give a study that has it by --study."
            )
    pair = _pair(data, source, target)
    paper = study is None
    evidence = Evidence(
        name,
        dataset.attribution if dataset else "",
        paper,
        (float(data.n.min()), float(data.n.max())),
        (float((data.d / data.n).min()) / TOKENS_PER_PARAMETER, float((data.d / data.n).max()) / TOKENS_PER_PARAMETER),
        speedups(pair, sigma, RESAMPLES),
        [],
        [],
        None,
        None,
        None,
    )
    if target == source:
        raise UserError(f"the run is trained by {source} already; name another optimizer by --to.")
    _law_speedup(evidence, known, source, target, n, d)
    measured = _measured(evidence, n, d, counted=not evidence.methods)
    evidence.methods += [measured] if measured else []
    if not any(method.counted for method in evidence.methods):
        raise UserError(f"{name} is too small to estimate a speedup of {target}; it needs two sizes and three budgets.")
    if dataset is None:
        evidence.notes.append("The fits' file holds no runs, so hyperparameters come from the published study.")
        dataset = paper_dataset()
    if target in dataset.optimizers:
        _hyperparameters(evidence, dataset, source, target, n, d)
    return evidence


def _pair(data: Observations, source: str, target: str) -> Observations:
    """The two optimizers alone, the source as baseline."""
    keep = [data.optimizers.index(source), data.optimizers.index(target)]
    mask = np.isin(data.index, keep)
    kept = data.where(mask)
    index = np.where(kept.index == keep[0], 0, 1)
    return Observations((source, target), index, kept.n, kept.d, kept.loss, kept.runs)


def _law_speedup(evidence: Evidence, known: Losses, source: str, target: str, n: float, d: float) -> None:
    """The study's own prediction: the hierarchical law over all its optimizers, the source as baseline."""
    try:
        law = known.law(source)
    except UserError as error:
        evidence.notes.append(f"No prediction by the law: {error}.")
        return
    speed = predict(law, target, n, d).speedup
    note = "all forms of the hierarchical law, weighed and widened by backtests: what `study fit` prints"
    draws = np.minimum(law.speedups(target, n, d), 1e3)
    evidence.methods.append(Method("hierarchical scaling law", speed, draws, True, note))


def _measured(evidence: Evidence, n: float, d: float, counted: bool) -> Method | None:
    """The cell that this run repeats, within 10% in size and budget; the law has it already, so it counts only without one."""
    for cell in evidence.cells:
        if max(abs(math.log(cell.n / n)), abs(math.log(cell.d / d))) > 0.1 or not math.isfinite(cell.high):
            continue
        spread = math.log(cell.high / cell.low) / (2 * stats.norm.ppf(0.95))
        draws = cell.value * np.exp(spread * stats.norm.ppf((np.arange(400) + 0.5) / 400))
        return Method(
            "measured at this size and budget",
            Estimate(cell.value, cell.low, cell.high),
            draws,
            counted,
            f"one cell of the study, {cell.n / 1e6:.0f}M parameters and {cell.d / 1e9:.1f}B tokens, with its noise",
        )
    return None


def _hyperparameters(evidence: Evidence, dataset: Dataset, source: str, target: str, n: float, d: float) -> None:
    best = dataset.best()

    def nearest(optimizer: str) -> Any:
        cells = [cell.record for (name, _), cell in best.items() if name == optimizer]
        return min(cells, key=lambda r: (math.log(r.parameters / n)) ** 2 + (math.log(r.tokens / d)) ** 2)

    record = nearest(target)
    where = f"tuned at {record.regime}"
    for name, value in record.hyper.items():
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or name in ("batch_size", "min_lr_ratio", "adam_lr")
        ):
            continue
        evidence.hyperparameters.append(Hyperparameter(name, value, None, None, where))
    if "adam_lr" in record.hyper and "scalar_lr_ratio" not in record.hyper:
        ratio = round(record.hyper["adam_lr"] / record.hyper["lr"], 3)
        evidence.hyperparameters.append(Hyperparameter("scalar_lr_ratio", ratio, None, None, where))
    lr = _law(dataset, target, "lr", n, d)
    if lr is not None:
        evidence.hyperparameters = [lr if h.name == "lr" else h for h in evidence.hyperparameters]
    evidence.source_lr = _law(dataset, source, "lr", n, d)
    evidence.tuned_batch = record.hyper.get("batch_size")
    records = [cell.record for (name, _), cell in best.items() if name == target]
    records.sort(key=lambda r: (math.log(r.parameters / n)) ** 2 + (math.log(r.tokens / d)) ** 2)
    evidence.cliff = next((cliff for r in records if (cliff := _cliff(dataset, target, r))), None)


def _law(dataset: Dataset, optimizer: str, key: str, n: float, d: float) -> Hyperparameter | None:
    cells = [cell.record for (name, _), cell in dataset.best().items() if name == optimizer]
    records = [r for r in cells if isinstance(r.hyper.get(key), (int, float)) and r.hyper[key] > 0]
    if len(records) < 3:
        return None
    law = fit_hyper_law(
        optimizer,
        key,
        np.array([float(r.parameters) for r in records]),
        np.array([float(r.tokens) for r in records]),
        np.array([float(r.hyper[key]) for r in records]),
    )
    low, high = law.interval(n, d)
    return Hyperparameter(key, float(law.predict(n, d)), low, high, f"law over {len(records)} regimes, 90% interval")


def _cliff(dataset: Dataset, optimizer: str, record: Any) -> tuple[float, float, str] | None:
    """In one regime, the lowest learning rate above the tuned one that loses more than 0.05 or diverges."""
    tuned, loss = record.hyper.get("lr"), record.loss
    if not tuned or loss is None:
        return None
    others = {key: value for key, value in record.hyper.items() if key != "lr"}
    bad = [
        r.hyper["lr"]
        for r in dataset.finished
        if r.optimizer == optimizer
        and r.regime == record.regime
        and r.hyper.get("lr", 0) > tuned
        and all(r.hyper.get(key) == value for key, value in others.items())
        and (r.loss is None or r.loss > loss + 0.05)
    ]
    return (float(tuned), float(min(bad)), str(record.regime)) if bad else None


def hyperparameter_flags(target: str, values: Sequence[Hyperparameter], iterations: int) -> dict[str, Any]:
    """Megatron's flags of the target's hyperparameters and of its schedule over `iterations` steps."""
    from megatron_opt.study.hyperparameters import SCHEDULE, flag_of, schedule_flags

    own = {"scalar_lr_ratio": "scalar-lr-ratio", "muon_eps": "muon-eps"}
    given = {h.name: h.value for h in values}
    flags: dict[str, Any] = {"optimizer": target.replace("_", "-") if target == "none" else target}
    for name, value in given.items():
        if name in SCHEDULE or name in ("normalize_grads",):
            continue
        value = int(value) if isinstance(value, float) and value == int(value) and name not in ("clip_grad",) else value
        flags[own.get(name) or flag_of(target, name)] = float(f"{value:.3g}") if isinstance(value, float) else value
    if "lr" in given:
        schedule = schedule_flags(target, {**given, "lr": flags["lr"]}, iterations)
        flags |= schedule
    return flags
