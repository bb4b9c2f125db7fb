"""Overhead of optimizers across batch, width, ranks and sizes from 130M to 1T: CSV, plots, and what bounds each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opt.cost_model import flags as flag_reader
from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.flags import preset
from megatron_opt.cost_model.report import published_spread
from megatron_opt.cost_model.step import Step, predict
from megatron_opt.errors import UserError
from megatron_opt.files import write_atomic
from megatron_opt.report.blocks import Plot, Series, colors
from megatron_opt.report.csv_files import write_csv
from megatron_opt.report.terminal import aligned

LIMIT = 0.10  # share of a step from which an optimizer no longer scales
_LLAMA = dict(preset("llama")) | {"bf16": True, "seq-length": 4096}


def _llama(layers: int, hidden: int, ffn: int, heads: int) -> dict[str, Any]:
    return _LLAMA | {"num-layers": layers, "hidden-size": hidden, "ffn-hidden-size": ffn, "num-attention-heads": heads}


@dataclass(frozen=True)
class Case:
    """A model, the batch (sequences of 4096 tokens) that is usual at its size, and the TP × PP it is trained with."""

    name: str
    shape: Mapping[str, Any]
    sequences: int
    tp: int
    pp: int


CASES = (
    Case("130M", _llama(32, 512, 2048, 8), 128, 1, 1),
    Case("520M", _llama(32, 1024, 4096, 16), 128, 1, 1),
    Case("1.2B", _llama(32, 1536, 6144, 24), 256, 1, 1),
    Case("7B", _llama(32, 4096, 11008, 32), 1024, 2, 1),
    Case("70B", _llama(80, 8192, 28672, 64), 2048, 8, 4),
    Case("405B", _llama(128, 16384, 53248, 128), 4096, 8, 16),
    Case("1T", _llama(128, 25600, 68096, 160), 8192, 8, 32),
)
GPUS = tuple(2**n for n in range(3, 15))


def flags_of(case: Case, optimizer: str, **more: Any) -> dict[str, Any]:
    """Flags of a run of a case."""
    base = dict(case.shape) | {
        "global-batch-size": case.sequences,
        "micro-batch-size": 1,
        "tensor-model-parallel-size": case.tp,
        "pipeline-model-parallel-size": case.pp,
        "sequence-parallel": case.tp > 1,
        "use-distributed-optimizer": True,
        "overlap-grad-reduce": True,
        "overlap-param-gather": True,
        "optimizer": optimizer,
    }
    return base | {key.replace("_", "-"): value for key, value in more.items()}


def bound(step: Step) -> str:
    """What takes most of the optimizer's time."""
    o = step.optimizer
    parts = dict(o.by_class)
    parts["element-wise passes"] = o.element_wise
    parts["exchange"] = o.exchange - o.exchange_hidden
    parts["host"] = o.host
    parts["refreshes"] = o.refresh / o.refresh_every
    parts["curvature"] = step.curvature
    kind = max(parts, key=lambda key: parts[key])
    idle = unconditioned(step)
    if idle > 0.5:
        return f"{kind}; {idle:.0%} of the parameters get no matrix work (every side is too long)"
    uneven = kind not in ("element-wise passes", "host") and o.imbalance > 1.5
    return f"{kind}, most loaded owner {o.imbalance:.1f}× the mean" if uneven else kind


def unconditioned(step: Step) -> float:
    """Share of the matrix rules' parameters that cost no FLOPs, such as SOAP's where both sides exceed its limit."""
    shard_groups = [shard_group for stage in step.plans for shard_group in stage]
    total = sum(shard_group.matrix_numel for shard_group in shard_groups)
    idle = sum(
        shard_group.infos[name].shape[0] * shard_group.infos[name].shape[-1]
        for shard_group in shard_groups
        for name, cost in shard_group.costs.items()
        if not cost.flops
    )
    return idle / total if total else 0.0


def _row(sweep: str, x: float, case: str, optimizer: str, step: Step | None) -> dict[str, Any]:
    if step is None:
        return {"sweep": sweep, "model": case, "x": x, "optimizer": optimizer}
    return {
        "sweep": sweep,
        "model": case,
        "x": x,
        "optimizer": optimizer,
        "gpus": step.layout.world,
        "tokens": step.tokens,
        "step_s": step.seconds,
        "optimizer_s": step.optimizer.mean + step.curvature,
        "refresh_step_s": step.refresh_step,
        "share": step.optimizer_share,
        "flop_share": step.optimizer_flops / step.training_flops,
        "memory_gb": step.memory.total / 1e9,
        "state_gb": step.memory.optimizer_state / 1e9,
        "imbalance": step.optimizer.imbalance,
        "bound": bound(step),
    }


def _predict(flags: Mapping[str, Any], cluster: Cluster, gpus: int) -> Step | None:
    try:
        return predict(flags, cluster, gpus, exact=False)
    except UserError:
        return None  # a layout that does not divide has no point in the plot


def sweeps(cluster: Cluster, optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """Every point of every sweep."""
    for name in optimizers:
        flag_reader.grouping({"optimizer": name})
    rows = []
    seven = next(case for case in CASES if case.name == "7B")
    for optimizer in optimizers:
        for sequences in (64, 128, 256, 512, 1024, 2048, 4096):
            step = _predict(flags_of(seven, optimizer, global_batch_size=sequences), cluster, 64)
            rows.append(_row("batch", sequences * 4096, "7B", optimizer, step))
        for hidden in (512, 1024, 2048, 4096, 8192, 16384):
            case = Case(str(hidden), _llama(32, hidden, 4 * hidden, hidden // 64), 1024, 8, 1)
            rows.append(
                _row("width", hidden, f"width {hidden}", optimizer, _predict(flags_of(case, optimizer), cluster, 64))
            )
        for case in CASES:
            for gpus in GPUS:
                step = _predict(flags_of(case, optimizer), cluster, gpus)
                if step is not None:
                    rows.append(_row("gpus", gpus, case.name, optimizer, step))
    return rows


def scaling_summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each model and optimizer: up to how many GPUs it stays under 10% of a step, and what bounds it."""
    head = (
        f"GPUs up to which the optimizer takes at most {LIMIT:.0%} of a mean step (usual batch of each size; "
        "> where the largest layout that divides is still under it), and what bounds it there"
    )
    cells = [("model", "optimizer", "GPUs", "share there", "share at most GPUs", "bound at most GPUs")]
    keys = dict.fromkeys((row["model"], row["optimizer"]) for row in rows if row["sweep"] == "gpus")
    for model, optimizer in keys:
        mine = [
            row for row in rows if row["sweep"] == "gpus" and (row["model"], row["optimizer"]) == (model, optimizer)
        ]
        good = [row for row in mine if row["share"] <= LIMIT]
        last = mine[-1]
        largest = good[-1] if good else None
        mark = "none" if largest is None else f"{'> ' if largest is last else ''}{largest['gpus']}"
        share = f"{largest['share']:.1%}" if largest else "-"
        cells.append((model, optimizer, mark, share, f"{last['share']:.1%} at {last['gpus']}", last["bound"]))
    return f"{head}\n\n{aligned(cells, left=(0, 1, 5))}"


def write_tables(cluster: Cluster, optimizers: Sequence[str], folder: Path) -> str:
    """`sweeps.csv`, `scaling.txt` and one PNG a sweep in the folder; returns the summary."""
    from megatron_opt.report.png import write_grid, write_png

    rows = sweeps(cluster, optimizers)
    names = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(folder / "sweeps.csv", names, [[row.get(name, "") for name in names] for row in rows])
    summary = scaling_summary(rows)
    if not cluster.measured:
        low, high = published_spread()["dense"]
        summary += (
            f"\n\nESTIMATE: rates of {cluster.name} are not measured on your machine; published runs took {low:.2f} to "
            f"{high:.2f} times the predicted step. `megatron-opt cost calibrate` on the machine replaces the rates."
        )
    write_atomic(folder / "scaling.txt", summary + "\n")
    labels = {"batch": "tokens a step (7B, 64 GPUs)", "width": "width (32 layers, 64 GPUs, TP8)"}
    for sweep, label in labels.items():
        write_png(_plot(rows, optimizers, cluster.title, label, sweep=sweep), folder / f"{sweep}.png")
    models = dict.fromkeys(row["model"] for row in rows if row["sweep"] == "gpus")
    plots = [_plot(rows, optimizers, model, "GPUs", sweep="gpus", model=model) for model in models]
    write_grid(plots, 4, cluster.title, folder / "gpus.png", share="all")
    return summary


def _plot(rows: Sequence[Mapping[str, Any]], optimizers: Sequence[str], title: str, label: str, **where: str) -> Plot:
    """Share of a step, a line an optimizer."""
    chosen = [row for row in rows if "share" in row and all(row[key] == value for key, value in where.items())]
    series = []
    for name, color in colors(optimizers).items():
        mine = [row for row in chosen if row["optimizer"] == name]
        series.append(Series(name, [row["x"] for row in mine], [100 * row["share"] for row in mine], color))
    unit, limit = "optimizer, % of a mean step", [(100 * LIMIT, f"{LIMIT:.0%}")]
    return Plot(where["sweep"], title, label, unit, series, x_log=True, y_log=True, horizontal=limit)
