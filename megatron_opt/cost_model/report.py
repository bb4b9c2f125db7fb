"""A predicted step as text and as plain data."""

import functools
from importlib import resources
from typing import Any

import yaml

from megatron_opt.cost_model.step import Step


def seconds(value: float) -> str:
    """A time with a fitting unit."""
    if value >= 100:
        return f"{value:.0f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def size(value: float) -> str:
    """Bytes with a fitting decimal unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def count(value: float) -> str:
    """Parameters or tokens, such as 6.74B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


@functools.cache
def published_spread() -> dict[str, tuple[float, float]]:
    """Least and greatest ratio of measured to predicted step times over published runs, dense and with experts."""
    text = (resources.files("megatron_opt") / "cost_model" / "published_runs.yaml").read_text(encoding="utf-8")
    return {kind: (low, high) for kind, (low, high) in yaml.safe_load(text)["spread"].items()}


def step_range(step: Step) -> tuple[float, float] | None:
    """Seconds between which published runs like this one lie around the prediction; None on a measured machine."""
    if step.cluster.measured:
        return None
    low, high = published_spread()["moe" if step.model.experts else "dense"]
    return low * step.seconds, high * step.seconds


def caveat(step: Step) -> str:
    """What the rates behind a prediction are worth."""
    reach = step_range(step)
    if reach is None:
        return f"rates of {step.cluster.name} were measured by `megatron-opt cost calibrate`."
    kind = "with experts" if step.model.experts else "of dense models"
    low, high = (value / step.seconds for value in reach)
    return (
        f"ESTIMATE: rates of {step.cluster.name} are not measured on your machine. Published runs {kind} took {low:.2f} to "
        f"{high:.2f} times the predicted step: {seconds(reach[0])} to {seconds(reach[1])} here. "
        "`megatron-opt cost calibrate` on the machine replaces the rates."
    )


def as_dict(step: Step) -> dict[str, Any]:
    """Everything that was predicted, in seconds, FLOPs and bytes."""
    o, m, t = step.optimizer, step.memory, step.traffic
    return {
        "optimizer": step.optimizer_name,
        "cluster": step.cluster.name,
        "gpus": step.layout.world,
        "layout": step.layout.name(),
        "parameters": step.model.total_parameters,
        "active_parameters": step.model.active_parameters,
        "non_embedding_parameters": step.model.hidden_parameters,
        "tokens_per_step": step.tokens,
        "tokens_per_second": step.tokens_per_second,
        "flops_per_second_per_gpu": step.flops_per_gpu,
        "seconds": {
            "step": step.seconds,
            "ordinary_step": step.ordinary,
            "refresh_step": step.refresh_step,
            "forward_backward": step.forward_backward,
            "pipeline_bubble": step.bubble,
            "communication": t.seconds,
            "communication_hidden": t.hidden,
            "communication_exposed": t.exposed,
            "optimizer": {
                "mean": o.mean,
                "ordinary": o.ordinary,
                "refresh_adds": o.refresh,
                "refresh_every": o.refresh_every,
                "by_class": o.by_class,
                "element_wise": o.element_wise,
                "host": o.host,
                "exchange": o.exchange,
                "exchange_hidden": o.exchange_hidden,
                "offload": o.offload,
                "curvature": step.curvature,
            },
        },
        "flops": {
            "training": step.training_flops,
            "optimizer": step.optimizer_flops,
            "optimizer_share": step.optimizer_flops / step.training_flops,
        },
        "bytes_sent": {**t.sent, **o.sent},
        "memory": {**vars(m), "total": m.total, "capacity": step.cluster.memory},
        "optimizer_state": {"fullest_gpu": o.state_bytes, "host_of_fullest_gpu": o.host_bytes},
        "imbalance": o.imbalance,
        "estimate": not step.cluster.measured,
        "step_range_of_published_runs": step_range(step),
    }


def text(step: Step, ignored: list[str] | None = None) -> str:
    """The breakdown as a table for people."""
    o, m, t, layout = step.optimizer, step.memory, step.traffic, step.layout
    total = step.seconds

    def row(name: str, value: float, note: str = "") -> str:
        return f"  {name:<34}{seconds(value):>12}{value / total:>8.1%}  {note}".rstrip()

    head = (
        f"{count(step.model.total_parameters)} parameters ({count(step.model.hidden_parameters)} without embeddings), "
        f"{step.optimizer_name}, {layout.world} × {step.cluster.name}, {layout.name()}, {layout.dtype}, "
        f"{count(step.tokens)} tokens a step in {layout.microbatches} micro-batches"
    )
    lines = [head, "", "time of a step", row("forward and backward", step.forward_backward)]
    if step.bubble:
        lines.append(row("pipeline bubble", step.bubble))
    for kind, value in t.seconds.items():
        hidden = t.hidden.get(kind, 0.0)
        note = f"of {seconds(value)}, {hidden / value:.0%} hidden; sends {size(t.sent[kind])}"
        lines.append(row(f"communication: {kind}", value - hidden, note))
    for kind, value in o.by_class.items():
        lines.append(row(f"optimizer: {kind}", value))
    lines.append(row("optimizer: element-wise passes", o.element_wise))
    if o.host:
        lines.append(row("optimizer: host", o.host))
    if o.exchange:
        note = f"{o.exchange_hidden / o.exchange:.0%} hidden; sends {size(sum(o.sent.values()))}"
        lines.append(row("optimizer: exchange with owners", o.exchange - o.exchange_hidden, note))
    if o.offload:
        note = f"of {seconds(2 * o.offload_way)}, {1 - o.offload / (2 * o.offload_way):.0%} hidden; {size(o.host_bytes)} each way"
        lines.append(row("optimizer: state in host memory", o.offload, note))
    if o.refresh:
        how = "staggered" if o.staggered else f"a refresh step takes {seconds(step.refresh_step)}"
        lines.append(row("optimizer: refreshes, mean", o.refresh / o.refresh_every, how))
    if step.curvature:
        every = f"once in {step.curvature_every} steps; a step with it takes {seconds(step.refresh_step)}"
        lines.append(row("optimizer: curvature, mean", step.curvature, every))
    lines.append(row("step, mean", total, f"{step.tokens_per_second:,.0f} tokens/s"))
    lines += [
        "",
        f"FLOPs: {step.training_flops:.3g} model, {step.optimizer_flops:.3g} optimizer "
        f"({step.optimizer_flops / step.training_flops:.2%}); {step.flops_per_gpu / 1e12:.1f} model TFLOP/s a GPU; "
        f"most loaded owner / mean {o.imbalance:.2f}",
        "",
        "memory of the fullest GPU",
    ]
    for name, value in vars(m).items():
        lines.append(f"  {name.replace('_', ' '):<34}{size(value):>12}{value / m.total:>8.1%}")
    verdict = "fits" if m.total <= step.cluster.memory else "DOES NOT FIT"
    lines.append(f"  {'total':<34}{size(m.total):>12}  {verdict} in {size(step.cluster.memory)}")
    if o.host_bytes:
        gpus = min(layout.world, step.cluster.gpus_per_node)
        lines.append(
            f"  {'state in host memory, of one GPU':<34}{size(o.host_bytes):>12}  {size(gpus * o.host_bytes)} a node"
        )
    lines += ["", caveat(step)]
    if ignored:
        lines += ["", f"flags that change no cost: {', '.join('--' + name for name in ignored)}"]
    return "\n".join(lines)
