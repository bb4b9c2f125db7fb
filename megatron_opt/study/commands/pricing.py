"""GPU-hours and money of runs that were not made, by the cost model on a named cluster."""

from __future__ import annotations

import argparse
import functools
import math

from megatron_opt.cost_model.cluster import Cluster, load
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.report import step_range
from megatron_opt.cost_model.step import Step, predict
from megatron_opt.cost_model.tables import CASES, flags_of
from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.wall_clock import ClusterTimes
from megatron_opt.study.runs import Run, argument_list
from megatron_opt.study.spec import Regime, Study
from megatron_opt.study.store import Record

PRICE = 2.5
"""dollars of a GPU-hour where none is given: an assumption, not an offer"""
GPUS = 64
"""devices that hours of runs without a layout are worked out for"""


def add_price_options(parser: argparse.ArgumentParser) -> None:
    """`--cluster` and `--price`."""
    parser.add_argument("--cluster", metavar="NAME|FILE", help="h100, a cluster file, …: hours by the cost model")
    parser.add_argument("--price", type=float, default=PRICE, help=f"dollars of a GPU-hour (default: {PRICE}, assumed)")


class Prices:
    """Seconds of runs on a cluster; every step is predicted once."""

    def __init__(self, cluster: str, price: float = PRICE):
        if not (math.isfinite(price) and price >= 0):
            raise UserError(f"--price is {price}; it must be a number of dollars, 0 or more")
        self.cluster: Cluster = load(cluster)
        self.price = price
        self._steps: dict[str, Step] = {}

    def step(self, study: Study, run: Run) -> Step:
        """The predicted step of a run in its own layout; raises UserError for one that does not fit into memory."""
        left = ("seed", "train-iters", "train-samples", "step-batch-size-schedule")
        keep = {key: value for key, value in (run.config["flags"] | run.surroundings).items() if key not in left}
        keep["global-batch-size"] = run.hyper["batch_size"]  # of a batch that grows its last
        step = self._step(study.executor.ranks * study.executor.nodes, argument_list(keep))
        if step.memory.total > self.cluster.memory:
            raise UserError(
                f"{run.optimizer} {run.regime} needs {step.memory.total / 1e9:.0f} GB on a GPU of {self.cluster.name} with "
                f"{self.cluster.memory / 1e9:.0f} GB; give the model other `flags:` or the executor more ranks"
            )
        return step

    def _step(self, gpus: int, words: list[str]) -> Step:
        key = f"{gpus} {' '.join(words)}"
        if key not in self._steps:
            self._steps[key] = predict(parse(words)[0], self.cluster, gpus, exact=False)
        return self._steps[key]

    def seconds_a_token(self, record: Record) -> float:
        """GPU-seconds of a token of a run that was made, in its own layout; raises UserError where its flags are not known."""
        if not record.arguments:
            return self._token(record.config.get("flags", {}).get("optimizer", record.optimizer), record.parameters)
        gpus = int(record.results.get("world_size") or 1)
        step = self._step(gpus, _without(record.arguments, ("seed", "train-iters")))
        return step.layout.world / step.tokens_per_second

    def beside(self, dataset: Dataset, n: float) -> ClusterTimes:
        """Ratios of step times at a data set's best runs, and at n parameters."""
        best = dataset.best()
        base = {regime: cell.record for (name, regime), cell in best.items() if name == dataset.baseline}
        a_token: dict[tuple[str, Regime], float] = {}
        target: dict[str, float] = {}
        notes: dict[str, None] = {}
        for (name, regime), cell in best.items():
            if regime not in base:
                continue
            try:
                a_token[name, regime] = self.seconds_a_token(cell.record)
            except UserError as error:
                notes[f"No time of {name} on {self.cluster.name}: {error}"] = None
            if name == dataset.baseline:
                continue
            own, other = (
                record.config.get("flags", {}).get("optimizer", record.optimizer)
                for record in (cell.record, base[regime])
            )
            if name not in target and own in registry.optimizers() and other in registry.optimizers():
                target[name] = self._token(own, n) / self._token(other, n)
        measured = {
            (name, regime): seconds / a_token[dataset.baseline, regime]
            for (name, regime), seconds in a_token.items()
            if name != dataset.baseline and (dataset.baseline, regime) in a_token
        }
        return ClusterTimes(self.cluster.name, measured, target, tuple(notes), a_token)

    def hours(self, study: Study, run: Run) -> float:
        """GPU-hours of a run."""
        step = self.step(study, run)
        return run.tokens / step.tokens_per_second * step.layout.world / 3600

    def spread(self) -> tuple[float, float] | None:
        """Least and most of measured over predicted step times of published runs; None on a measured cluster."""
        steps = list(self._steps.values())
        reach = step_range(steps[0]) if steps else None
        return None if reach is None else (reach[0] / steps[0].seconds, reach[1] / steps[0].seconds)

    def anywhere(self, optimizer: str, n: float, d: float) -> float:
        """GPU-hours of a Llama of n parameters over d tokens: the nearest usual size on 64 GPUs, in proportion to n."""
        return self._token(optimizer, n) * d / 3600

    def _token(self, optimizer: str, n: float) -> float:
        """GPU-seconds of a token."""
        sizes = _sizes()
        near = min(sizes, key=lambda name: abs(math.log(sizes[name] / n)))
        step = self._usual(near, optimizer)
        return step.layout.world / step.tokens_per_second * n / sizes[near]

    @functools.lru_cache(maxsize=512)  # noqa: B019  (one object a command)
    def _usual(self, case: str, optimizer: str) -> Step:
        shape = next(one for one in CASES if one.name == case)
        gpus = max(GPUS, shape.tp * shape.pp)
        try:
            return predict(flags_of(shape, optimizer), self.cluster, gpus, exact=False)
        except UserError:
            # An entry under a name of its own, or an optimizer that the cost model does not know: AdamW's step.
            return predict(flags_of(shape, "adamw"), self.cluster, gpus, exact=False)


def _without(words: list[str], names: tuple[str, ...]) -> list[str]:
    """A command line without some flags and their values."""
    kept, keep = [], True
    for word in words:
        if word.startswith("--"):
            keep = word.removeprefix("--") not in names
        if keep:
            kept.append(word)
    return kept


def cluster_times(cluster: str | None, dataset: Dataset, n: float) -> ClusterTimes | None:
    """Step times of a data set on a cluster, by name or file; None without one."""
    return None if cluster is None else Prices(cluster).beside(dataset, n)


@functools.cache
def _sizes() -> dict[str, int]:
    """Parameters between the embeddings of the usual sizes."""
    return {case.name: Model.of(flags_of(case, "adamw")).hidden_parameters for case in CASES}


def words(low: float, high: float, form: str) -> str:
    """A range, or one number where both ends look alike."""
    ends = list(dict.fromkeys(form.format(value) for value in (low, high)))
    return " to ".join(ends)
