"""Which layouts of a model fit a number of GPUs, how fast they are, and why the others fall out."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_opt.cost_model import flags as flag_reader
from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.step import OptimizerWork, Step, check_world, optimizer_work, predict_layout
from megatron_opt.errors import UserError


@dataclass
class Found:
    """Layouts that fit, the fastest first; the others' reasons with how many share each, and examples."""

    steps: list[Step]
    refused: Counter[str]
    examples: dict[str, str] = field(default_factory=dict)
    tried: int = 0


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def candidates(model: Model, base: Layout, cluster: Cluster, world: int) -> Iterator[Layout]:
    """Layouts to try: powers of two for TP (within a node), PP, EP; micro-batches 1 to 8; three recomputations."""
    tensor = [t for t in _powers(min(cluster.gpus_per_node, world, model.heads)) if t <= 64]
    stages = [
        p for p in range(1, min(model.layers, world) + 1) if model.layers % p == 0 and (p & (p - 1) == 0 or p < 9)
    ]
    experts = [e for e in _powers(min(model.experts, world))] if model.experts else [1]
    for tp, pp, ep, micro in itertools.product(tensor, stages, experts, (1, 2, 4, 8)):
        virtuals = [1] + ([v for v in (2, 4) if pp > 1 and model.layers % (pp * v) == 0])
        for virtual, recompute in itertools.product(virtuals, ("none", "selective", "full")):
            if recompute == "selective" and base.flash:
                continue  # fused attention keeps nothing that selective recomputation would drop
            yield replace(
                base,
                world=world,
                tp=tp,
                etp=1 if model.experts else tp,
                pp=pp,
                ep=ep,
                virtual=virtual,
                micro_batch=micro,
                recompute=recompute,
                sequence_parallel=tp > 1,
                distributed=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
            )


def search(flags: Mapping[str, Any], cluster: Cluster, world: int, *, top: int = 10) -> Found:
    """Rank all candidate layouts by tokens per second."""
    check_world(cluster, world)
    model = Model.of(flags)
    wanted = {
        **flags,
        **{
            key: 1
            for key in (
                "tensor-model-parallel-size",
                "pipeline-model-parallel-size",
                "expert-model-parallel-size",
                "num-virtual-stages-per-pipeline-rank",
                "expert-tensor-parallel-size",
                "micro-batch-size",
            )
        },
    }
    wanted.pop("num-layers-per-virtual-pipeline-stage", None)
    if not flags.get("global-batch-size"):
        raise UserError("--global-batch-size is missing; a search needs the batch that a step must do.")
    base = Layout.of({**wanted, "global-batch-size": 1}, 1, model)
    base = replace(base, global_batch=int(flags["global-batch-size"]), cp=int(flags.get("context-parallel-size") or 1))
    rules = flag_reader.grouping(flags)
    name, decay = str(flags.get("optimizer", "adamw")), str(flags.get("decay-mode", "decoupled"))
    found = Found([], Counter())
    works: dict[tuple[int, ...], OptimizerWork] = {}
    for layout in candidates(model, base, cluster, world):
        found.tried += 1
        problem = layout.problem(model)
        if problem:
            _refuse(found, _reason(problem), layout, problem)
            continue
        if layout.micro_batch > 1 and layout.recompute == "full" and layout.virtual > 1:
            _refuse(
                found, "full recomputation with virtual stages and larger micro-batches: never the fastest", layout, ""
            )
            continue
        key = (layout.tp, layout.pp, layout.ep, layout.etp)
        if key not in works:
            works[key] = optimizer_work(model, layout, cluster, rules, decay)
        step = predict_layout(model, layout, cluster, rules, name, decay, works[key])
        if step.memory.total > cluster.memory:
            short = f"needs {step.memory.total / 1e9:.0f} GB of {cluster.memory / 1e9:.0f} GB"
            _refuse(found, "does not fit into memory", layout, short)
            continue
        found.steps.append(step)
    found.steps.sort(key=lambda step: step.seconds)
    found.steps = _distinct(found.steps)[:top]
    return found


def _distinct(steps: list[Step]) -> list[Step]:
    """The best of each (TP, PP, EP): its fastest micro-batch, virtual stages and recomputation."""
    seen: set[tuple[int, int, int]] = set()
    kept = []
    for step in steps:
        key = (step.layout.tp, step.layout.pp, step.layout.ep)
        if key not in seen:
            seen.add(key)
            kept.append(step)
    return kept


def _reason(problem: str) -> str:
    """The kind of a problem: its words without its numbers."""
    return " ".join(word for word in problem.split() if not any(c.isdigit() for c in word))


def _refuse(found: Found, reason: str, layout: Layout, example: str) -> None:
    found.refused[reason] += 1
    if example:
        found.examples.setdefault(reason, f"{layout.name()}: {example}")


def table(found: Found, top: int = 10) -> str:
    """Ranked layouts, then what fell out and why."""
    head = (
        "rank",
        "layout",
        "micro",
        "virtual",
        "recompute",
        "step s",
        "optimizer",
        "bubble",
        "comm",
        "TFLOP/s",
        "memory GB",
    )
    rows = [head]
    for rank, step in enumerate(found.steps[:top], 1):
        o = step.layout
        rows.append(
            (
                str(rank),
                o.name(),
                str(o.micro_batch),
                str(o.virtual),
                o.recompute,
                f"{step.seconds:.3f}",
                f"{step.optimizer_share:.1%}",
                f"{step.bubble / step.seconds:.1%}",
                f"{step.traffic.exposed / step.seconds:.1%}",
                f"{step.flops_per_gpu / 1e12:.0f}",
                f"{step.memory.total / 1e9:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    if not found.steps:
        lines = ["no layout fits"]
    lines.append("")
    lines.append(f"{found.tried} layouts tried; fell out:")
    for reason, times in found.refused.most_common():
        example = found.examples.get(reason)
        lines.append(f"  {times:>5}  {reason}" + (f" (such as {example})" if example else ""))
    return "\n".join(lines)
