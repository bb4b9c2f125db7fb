"""Published training runs beside their predictions: how far rates from data sheets are to be trusted."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from megatron_opt.cost_model.cluster import Cluster, load
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.step import predict
from megatron_opt.report import markdown
from megatron_opt.report.blocks import Table

ZERO = "--sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --optimizer adamw"


@dataclass(frozen=True)
class Run:
    """A published run; `seconds` is its step time, `predicted` ours."""

    name: str
    cluster: str
    moe: bool
    seconds: float
    predicted: float
    tflops: float
    source: str
    assumed: str
    recipe: str = ""  # of FP8
    held_out: bool = False  # no rate was fitted to it

    @property
    def ratio(self) -> float:
        """Measured over predicted step time: above 1 the prediction was optimistic."""
        return self.seconds / self.predicted


def published_runs(clusters: Iterable[str] = ()) -> list[Run]:
    """Every run of the table (or those on some clusters) with its prediction."""
    text = (resources.files("megatron_opt") / "cost_model" / "published_runs.yaml").read_text(encoding="utf-8")
    content, wanted, runs = yaml.safe_load(text), set(clusters), []
    for row in content["runs"]:
        if wanted and row["cluster"] not in wanted:
            continue
        words = f"{content['models'][row['model']]} {row['flags']} {ZERO}".split()
        step = predict(parse(words)[0], _machine(row, content["memory"]), row["gpus"], exact=False)
        flops = step.model.step_flops_per_token
        tokens = row.get("tokens") or row["tflops"] * 1e12 / flops
        runs.append(
            Run(
                f"{row['model']}, {row['gpus']} × {row['cluster']}, {step.layout.name()}"
                + (f", {step.layout.fp8.recipe}" if step.layout.fp8 else ""),
                row["cluster"],
                step.model.experts > 0,
                step.tokens / row["gpus"] / tokens,
                step.seconds,
                tokens * flops / 1e12,
                content["sources"][row["source"]],
                row.get("assumed", ""),
                step.layout.fp8.recipe if step.layout.fp8 else "",
                row.get("held_out", False),
            )
        )
    return runs


def _machine(row: Mapping[str, Any], memory: Mapping[str, float]) -> Cluster:
    """The run's cluster, with the memory bandwidth that its source gives where that is another."""
    cluster = load(row["cluster"])
    share = memory.get(row["source"], 1.0)
    passes, reads = (tuple((size, share * rate) for size, rate in curve) for curve in (cluster.passes, cluster.reads))
    return replace(cluster, passes=passes, reads=reads)


def spread(runs: Iterable[Run]) -> tuple[float, float, float, int]:
    """Least, median and greatest ratio of measured to predicted step time, and how many runs."""
    ratios = [run.ratio for run in runs]
    return min(ratios), statistics.median(ratios), max(ratios), len(ratios)


def table(runs: Iterable[Run]) -> str:
    """The runs as Markdown."""
    header = ["run", "measured s", "predicted s", "measured / predicted", "TFLOP/s a GPU", "source"]
    rows = []
    for run in runs:
        seconds = [f"{value:.2f}" for value in (run.seconds, run.predicted, run.ratio)]
        source = f"{run.source} ({run.assumed})" if run.assumed else run.source
        rows.append([run.name, *seconds, f"{run.tflops:.0f}", source])
    return "\n".join(markdown.table(Table(header, rows)))
