"""Which layouts of a model fit a number of GPUs, how fast they are, and why the others fall out."""

import functools
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from megatron_opt.cost_model import flags as flag_reader
from megatron_opt.cost_model.cluster import Cluster
from megatron_opt.cost_model.layers import layer_shape
from megatron_opt.cost_model.layout import Layout
from megatron_opt.cost_model.memory import least
from megatron_opt.cost_model.model import Model
from megatron_opt.cost_model.pipeline import balanced, split_flags
from megatron_opt.cost_model.report import caveat
from megatron_opt.cost_model.step import (
    OptimizerWork,
    Step,
    check_world,
    optimizer_work,
    pipeline_seconds,
    predict_layout,
)
from megatron_opt.cost_model.traffic import traffic
from megatron_opt.errors import UserError
from megatron_opt.report.terminal import aligned

MICRO = (1, 2, 4, 8)
VIRTUAL = (2, 3, 4, 6, 8)
SHORTEST = 4096  # tokens of a sequence on one rank below which context parallelism is not tried
MEMORY, SLOWER = "does not fit into memory", "slower than those shown even before its optimizer is counted"
SIBLING = "another micro-batch, virtual stages or recomputation of a layout shown is faster"


@dataclass
class SearchResult:
    """Layouts that fit, the fastest first; the others' reasons with how many share each, and examples."""

    steps: list[Step]
    refused: Counter[str]
    examples: dict[str, str] = field(default_factory=dict)
    tried: int = 0

    def refuse(self, reason: str, layout: Layout, example: str = "") -> None:
        """Count a layout under the reason why it falls out."""
        self.refused[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = layout.name() + (f": {example}" if example else "")


def _powers(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length()) if 2**n <= limit]


@functools.lru_cache(maxsize=512)
def splits(model: Model, pp: int, virtual: int) -> tuple[tuple[int, ...], ...]:
    """Cuts to try: the even one where layers divide, and the one that weighs layers and the output layer."""
    even = [()] if model.layers % (pp * virtual) == 0 else []
    if pp == 1:
        return tuple(even)
    attended = model.attention_flops()
    weights = [layer_shape(model, layer in model.expert_layers).flops + attended for layer in range(model.layers)]
    weighed = balanced(weights, (0.0, model.output_flops()), pp * virtual)
    return tuple(even) if even and len(set(weighed)) == 1 else (*even, weighed)


def recomputations(model: Model, base: Layout) -> list[tuple[str, tuple[str, ...]]]:
    """None, selective and full; selective drops what is cheap to make again: norms, activations, MLA's up-projections."""
    ways: list[tuple[str, tuple[str, ...]]] = [("none", ()), ("full", ())]
    modules: tuple[str, ...] = () if base.flash else ("core_attn",)
    if model.experts or model.mla:
        modules += ("layernorm",) + (("moe_act",) if model.experts else ()) + (("mla_up_proj",) if model.mla else ())
    if modules:
        ways.insert(1, ("selective", modules))
    return ways


# flags whose values a search tries
SEARCHED = (
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "context-parallel-size",
    "expert-model-parallel-size",
    "expert-tensor-parallel-size",
    "num-virtual-stages-per-pipeline-rank",
    "num-layers-per-virtual-pipeline-stage",
    "pipeline-model-parallel-layout",
    "decoder-first-pipeline-num-layers",
    "decoder-last-pipeline-num-layers",
    "account-for-embedding-in-pipeline-split",
    "account-for-loss-in-pipeline-split",
    "overlap-moe-expert-parallel-comm",
    "recompute-granularity",
    "recompute-activations",
    "micro-batch-size",
)


def candidates(model: Model, base: Layout, cluster: Cluster, world: int) -> Iterator[Layout]:
    """Layouts to try: TP in a node, CP, EP and PP in powers of two (PP also up to 8), micro-batches, virtual stages.

    Uneven cuts are tried beside even ones; CP only where a rank keeps `SHORTEST` tokens.
    """
    tensor = _powers(min(cluster.gpus_per_node, world, model.heads, 64))
    context = [c for c in _powers(world) if c == 1 or model.sequence // c >= SHORTEST]
    stages = [p for p in range(1, min(model.layers, world) + 1) if (p & (p - 1) == 0 or p < 9) and world % p == 0]
    experts = _powers(min(model.experts, world)) if model.experts else [1]
    kinds = recomputations(model, base)
    for tp, cp, pp, ep in itertools.product(tensor, context, stages, experts):
        one = replace(
            base,
            world=world,
            tp=tp,
            cp=cp,
            etp=1 if model.experts else tp,
            pp=pp,
            ep=ep,
            sequence_parallel=tp > 1,
            distributed=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        virtuals = [1] + [v for v in VIRTUAL if pp > 1 and pp * v <= model.layers + 2]
        for virtual in virtuals:
            for split, micro, (recompute, modules) in itertools.product(splits(model, pp, virtual), MICRO, kinds):
                yield replace(
                    one, virtual=virtual, split=split, micro_batch=micro, recompute=recompute, modules=modules
                )


def search(
    flags: Mapping[str, Any], cluster: Cluster, world: int, *, top: int = 10, progress: TextIO | None = None
) -> SearchResult:
    """Rank all candidate layouts by tokens per second; every other one is counted by the reason why it falls out.

    Two passes: memory without the optimizer's state and time without its step, which are lower bounds, for all; the
    optimizer's plan, which takes long, in the order of those times until no layout left can be among the first `top`.
    """
    check_world(cluster, world)
    model, base = _base(flags, cluster)
    group_configs = flag_reader.grouping(flags)
    name, decay = str(flags.get("optimizer", "adamw")), str(flags.get("decay-mode", "decoupled"))
    result, report = SearchResult([], Counter()), _Progress(progress)
    fitting: list[tuple[float, int, Layout]] = []
    for layout in candidates(model, base, cluster, world):
        result.tried += 1
        report.say(f"{result.tried:,} layouts tried, {len(fitting):,} may fit")
        if problem := layout.problem(model):
            result.refuse(_reason(problem), layout, problem)
        elif (bytes_ := least(model, layout, cluster)) > cluster.memory:
            result.refuse(MEMORY, layout, f"needs {bytes_ / 1e9:.0f} GB of {cluster.memory / 1e9:.0f} GB")
        else:
            busy, bubble = pipeline_seconds(model, layout, cluster)
            seconds = busy + bubble + traffic(model, layout, cluster, busy).exposed
            fitting.append((seconds, result.tried, layout))
    fitting.sort()
    works: dict[tuple[Any, ...], OptimizerWork] = {}
    best: dict[tuple[int, ...], Step] = {}
    for index, (seconds, _, layout) in enumerate(fitting):
        times = sorted(step.seconds for step in best.values())
        if len(times) >= top and seconds > times[top - 1]:
            for _, _, rest in fitting[index:]:
                result.refuse(SIBLING if _sizes(rest) in best else SLOWER, rest)
            break
        report.say(f"{index + 1:,} of {len(fitting):,} layouts that may fit, with the optimizer", index == 0)
        key = (
            layout.tp,
            layout.cp,
            layout.pp,
            layout.ep,
            layout.etp,
            layout.stages(model)[0],
            layout.stages(model)[-1],
        )
        if key not in works:
            works[key] = optimizer_work(model, layout, cluster, group_configs, decay)
        step = predict_layout(model, layout, cluster, group_configs, name, decay, works[key])
        other = best.get(_sizes(layout))
        if step.memory.total > cluster.memory:
            result.refuse(MEMORY, layout, f"needs {step.memory.total / 1e9:.0f} GB of {cluster.memory / 1e9:.0f} GB")
        elif other is not None and other.seconds <= step.seconds:
            result.refuse(SIBLING, layout)
        else:
            if other is not None:
                result.refuse(SIBLING, other.layout)
            best[_sizes(layout)] = step
    ranked = sorted(best.values(), key=lambda step: step.seconds)
    for step in ranked[top:]:
        result.refuse(SLOWER.replace(" even before its optimizer is counted", ""), step.layout)
    result.steps = ranked[:top]
    report.end()
    return result


def _base(flags: Mapping[str, Any], cluster: Cluster) -> tuple[Model, Layout]:
    """The model, and a layout that has everything but sizes from the flags."""
    if not flags.get("global-batch-size"):
        raise UserError("--global-batch-size is missing; a search needs the batch that a step must do.")
    copies = "num-distributed-optimizer-instances"  # what a rank alone cannot have
    kept = {key: value for key, value in flags.items() if key not in (*SEARCHED, copies)}
    model = Model.of({**kept, "tensor-model-parallel-size": flags.get("tensor-model-parallel-size")}).priced()
    base = Layout.of({**kept, "global-batch-size": 1}, 1, model)
    batch = int(flags["global-batch-size"])
    overlap = bool(flags.get("overlap-moe-expert-parallel-comm"))
    return model, replace(base, global_batch=batch, overlap_ep=overlap, instances=int(flags.get(copies) or 1))


def _sizes(layout: Layout) -> tuple[int, ...]:
    return layout.tp, layout.cp, layout.pp, layout.ep


class _Progress:
    """One line that is written over, on a terminal; at most twice a second."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream, self.last, self.wrote = stream, time.monotonic(), False

    def say(self, text: str, now: bool = False) -> None:
        if self.stream is None or (not now and time.monotonic() - self.last < 0.5):
            return
        self.last, self.wrote = time.monotonic(), True
        self.stream.write(f"\r{text:<78}")
        self.stream.flush()

    def end(self) -> None:
        if self.stream is not None and self.wrote:
            self.stream.write("\r" + " " * 78 + "\r")
            self.stream.flush()


def progress_stream() -> TextIO | None:
    """Where progress goes: the error stream, so that the table can be piped."""
    return sys.stderr


def _reason(problem: str) -> str:
    """The kind of a problem: its words without its numbers."""
    return " ".join(word for word in problem.split() if not any(c.isdigit() for c in word))


def table(result: SearchResult, top: int = 10) -> str:
    """Ranked layouts, the flags of uneven cuts, then what fell out and why."""
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
    for rank, step in enumerate(result.steps[:top], 1):
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
    lines = [aligned(rows, left=(0, 1)) if result.steps else "no layout fits", ""]
    if result.steps:
        lines += [caveat(result.steps[0]), ""]
    notes: dict[str, list[str]] = {}
    for rank, step in enumerate(result.steps[:top], 1):
        o = step.layout
        if words := split_flags(o.split, o.pp, o.virtual):
            notes.setdefault(words, []).append(str(rank))
        if o.modules:
            notes.setdefault(f"--recompute-modules {' '.join(o.modules)}", []).append(str(rank))
    lines += [f"{words}  (rank {', '.join(ranks)})" for words, ranks in notes.items()] + [""] * bool(notes)
    lines.append(f"{result.tried:,} layouts tried, {len(result.steps)} shown; fell out:")
    for reason, times in result.refused.most_common():
        example = result.examples.get(reason)
        lines.append(f"  {times:>7,}  {reason}" + (f" (such as {example})" if example else ""))
    return "\n".join(lines)
