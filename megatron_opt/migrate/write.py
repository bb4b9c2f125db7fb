"""The report of a plan: what to do, what it costs and gains, what may go wrong, how to check."""

import math
from collections.abc import Callable
from typing import Any

from megatron_opt.cost_model import report as units
from megatron_opt.cost_model.step import Step
from megatron_opt.migrate import advice, charts
from megatron_opt.migrate.decision import decide
from megatron_opt.migrate.document import Document
from megatron_opt.migrate.evidence import Method
from megatron_opt.migrate.plan import Plan, command
from megatron_opt.report.blocks import Block, Code, Items, Section, Table


def document(plan: Plan) -> Document:
    """All blocks of the report."""
    decided = advice.verdict(plan)
    model = plan.before.model
    kind = {"switch": "good", "try": "wait", "stay": "bad"}[decided.action]
    hours = decide(plan).expected
    facts = [
        (
            "model",
            f"{units.count(model.total_parameters)} parameters, {units.count(model.hidden_parameters)} without "
            "embeddings",
        ),
        (
            "budget",
            f"{units.count(plan.tokens)} tokens, {plan.chinchilla:.2g}x Chinchilla"
            + (f", {plan.done:.0%} done" if plan.done else ""),
        ),
        ("cluster", f"{plan.gpus} × {plan.cluster.name}, {plan.before.layout.name()}"),
        ("wall-clock speedup", plan.speedup.text(2, "×")),
        ("chance of saving time", f"{plan.chance:.0%}"),
        ("GPU-hours " + ("saved" if hours >= 0 else "lost") + ", expected", f"{abs(hours):,.0f} of {plan.hours:,.0f}"),
        ("confidence", decided.confidence),
    ]
    sections = [
        _gain(plan),
        _cost(plan),
        _hyperparameters(plan),
        _refused(plan),
        Section("Risks", blocks=[_risks(plan)]),
        _experiments(plan),
        _method(plan),
    ]
    title = f"From {plan.source} to {plan.target}"
    return Document(title, decided.sentence, kind, facts, sections)


def _gain(plan: Plan) -> Section:
    rows = []
    shown = [m for m in plan.evidence.methods if m.counted and math.isfinite(m.estimate.high)]
    left_out = [m for m in plan.evidence.methods if m not in shown]
    for method in shown:
        wall = method.estimate.over(plan.ratio)
        rows.append((method.name, method.estimate.text(2, "×"), wall.text(2, "×"), method.note))
    together = plan.token_speedup.text(2, "×"), plan.speedup.text(2, "×")
    rows.append(("taken together", *together, "geometric mean; the widest interval"))
    lines = [(m.name, m.estimate.value, m.estimate.low, m.estimate.high) for m in shown]
    s = plan.speedup
    lines.append(("wall-clock, together", s.value, s.low, s.high))
    n = float(plan.before.model.hidden_parameters)
    cells = [(c.n, c.value, c.low, c.high) for c in plan.evidence.cells]
    token = plan.token_speedup
    months = [("mid", s.value), ("low end", s.low), ("high end", s.high)]
    blocks: list[Block] = [
        f"Token speedup: how many more tokens {plan.source} needs for the loss that {plan.target} reaches at this "
        "size and budget. "
        f"Wall-clock speedup is token speedup divided by the ratio of step times, {plan.ratio:.3f}: the change "
        "breaks even at a token "
        f"speedup of {plan.ratio:.3f}×.",
        Table(("estimate", "token speedup (90%)", "wall-clock (90%)", "how"), rows),
        *([_footnote(left_out)] if left_out else []),
        charts.intervals(
            lines,
            "speedups and their intervals",
            f"Token speedups by method and the wall-clock speedup: {s.value:.2f}×, 90% interval {s.low:.2f} to "
            f"{s.high:.2f}.",
        ),
        charts.scatter(
            cells,
            (n, token.value, token.low, token.high),
            "token speedup against model size",
            f"Measured token speedups of {plan.target} by size (blue) and the estimate for this run (orange).",
        ),
        Table(
            ("speedup", "GPU-hours for the same loss", "saved"),
            [
                (f"{name}, {value:.2f}×", f"{plan.hours / value:,.0f}", f"{plan.saved(value):+,.0f}")
                for name, value in months
            ],
        ),
    ]
    if plan.extrapolates:
        blocks.insert(
            0,
            Items([text[0].upper() + text[1:] + "." for text in plan.extrapolates], ["high"] * len(plan.extrapolates)),
        )
    return Section("What it gains", blocks=blocks)


def _footnote(methods: list[Method]) -> str:
    """Ways that are not counted, or have no finite answer, outside of the table."""
    words = [
        f"{m.name} ({m.note}), "
        + (
            f"{m.estimate.value:.2f}×"
            if math.isfinite(m.estimate.value) and m.estimate.value < 10
            else "without a usable answer here"
        )
        for m in methods
    ]
    return "Not counted: " + "; ".join(words) + "."


def _experiments(plan: Plan) -> Section:
    decision = decide(plan)
    now = "switching" if decision.switch else "staying"
    blocks: list[Block] = [
        f"Decided now, {now} is the better choice: switching is expected to {'save' if decision.switch else 'lose'} "
        f"{abs(decision.expected):,.0f} GPU-hours. "
        f"Knowing the speedup for certain would be worth {decision.perfect:,.0f} GPU-hours more; no experiment can be worth "
        "more than that."
    ]
    rows = [
        (
            item.words,
            f"{item.hours:,.0f}",
            f"{max(0.0, decision.expected):,.0f}",
            f"{item.saving:,.0f}",
            f"{item.changes:.0%}",
            f"{item.value:+,.0f}",
        )
        for item in decision.experiments[:4]
    ]
    head = ("experiment", "price", "saving without it", "saving with it", "changes the decision", "worth less price")
    if rows:
        blocks.append(Table(head, rows))
    if decision.best is not None:
        blocks.append(f"Do this one first: {decision.best.words}. Compare only ends of schedules.")
    elif rows:
        blocks.append("None of these is worth its price: decide without.")
    else:
        blocks.append("No experiment has a chance to change the decision: none is offered.")
    return Section("Is an experiment worth its price", blocks=blocks)


def _parts(step: Step) -> dict[str, float]:
    o = step.optimizer
    parts = {
        "forward and backward": step.forward_backward,
        "pipeline bubble": step.bubble,
        "communication": step.traffic.exposed,
        "optimizer kernels": sum(o.by_class.values()) + o.refresh / o.refresh_every,
        "optimizer element-wise": o.element_wise,
        "optimizer exchange": o.exchange - o.exchange_hidden,
    }
    parts["host"] = max(0.0, step.seconds - sum(parts.values()))
    return {name: value for name, value in parts.items() if value > 1e-4 * step.seconds}


def _cost(plan: Plan) -> Section:
    before, after = plan.before, plan.after

    def changed(name: str, show: Callable[[float], str], of: Callable[[Step], float]) -> tuple[str, ...]:
        a, b = of(before), of(after)
        return name, show(a), show(b), f"{b / a - 1:+.1%}" if a else "-"

    def both(name: str, show: Callable[[float], str], of: Callable[[Step], float]) -> tuple[str, ...]:
        return name, show(of(before)), show(of(after)), ""

    rows = [
        changed("step, mean", units.seconds, lambda step: step.seconds),
        changed("step with refreshes", units.seconds, lambda step: step.refresh_step),
        changed("optimizer", units.seconds, lambda step: step.optimizer.mean),
        changed("tokens per second", "{:,.0f}".format, lambda step: step.tokens_per_second),
        both(
            "optimizer FLOPs / training FLOPs", "{:.2%}".format, lambda step: step.optimizer_flops / step.training_flops
        ),
        both("bytes sent for the optimizer, a GPU", units.size, lambda step: sum(step.optimizer.sent.values())),
        changed("optimizer state, fullest GPU", units.size, lambda step: step.memory.optimizer_state),
        changed("memory, fullest GPU", units.size, lambda step: step.memory.total),
    ]
    scale = 1.0 if before.seconds >= 1 else 1e3
    unit = "s" if scale == 1 else "ms"
    named = {plan.source: before, plan.target: after}
    steps = {name: {k: v * scale for k, v in _parts(step).items()} for name, step in named.items()}
    memory = {
        name: {k.replace("_", " "): v / 1e9 for k, v in vars(step.memory).items() if v > 1e-3 * step.memory.total}
        for name, step in named.items()
    }
    blocks: list[Block] = [
        Table(("per step", plan.source, plan.target, "change"), rows),
        charts.stacks(
            "step",
            "step time",
            unit,
            steps,
            f"Time of a mean step: {units.seconds(before.seconds)} with {plan.source}, "
            f"{units.seconds(after.seconds)} with {plan.target}.",
        ),
        charts.stacks(
            "memory",
            "memory",
            "GB",
            memory,
            f"Memory of the fullest GPU: {units.size(before.memory.total)} and {units.size(after.memory.total)} "
            f"of {units.size(plan.cluster.memory)}.",
            (plan.cluster.memory / 1e9, "capacity"),
        ),
    ]
    if plan.layouts is not None:
        fitting = [
            (
                s.layout.name(),
                str(s.layout.micro_batch),
                s.layout.recompute,
                units.seconds(s.seconds),
                units.size(s.memory.total),
            )
            for s in plan.layouts.steps
        ]
        blocks += [
            f"{plan.target} does not fit in the present layout. Layouts that fit:" if fitting else "No layout fits.",
            Table(("layout", "micro-batch", "recomputation", "step", "memory"), fitting),
        ]
    return Section("What it costs", blocks=blocks)


def _hyperparameters(plan: Plan) -> Section:
    rows = [
        (
            h.name,
            f"{h.value:.4g}" if isinstance(h.value, float) else str(h.value),
            f"{h.low:.2g} to {h.high:.2g}" if h.low is not None and h.high is not None else "",
            h.source,
        )
        for h in plan.evidence.hyperparameters
    ]
    return Section(
        "Hyperparameters",
        blocks=[
            "Flags to change; the rest of the recipe stays. Values with an interval come from a law fitted over "
            "regimes, the others from "
            "the nearest tuned regime.",
            Table(("hyperparameter", "value", "90% interval", "from"), rows),
            Code(command(plan)),
            "Try at least the law's learning rate and half of it: the cliff lies above, not below.",
        ],
    )


def _refused(plan: Plan) -> Section:
    if not plan.refused:
        return Section("What is refused", blocks=[f"Nothing: all of the run's flags work with {plan.target}."])
    return Section("What is refused", blocks=[Items(plan.refused, ["refused"] * len(plan.refused))])


def _risks(plan: Plan) -> Items:
    risks = advice.risks(plan)
    return Items([risk.sentence for risk in risks], [risk.severity for risk in risks])


def _method(plan: Plan) -> Section:
    e = plan.evidence
    sentences = [
        f"Evidence: {e.source}, {len(e.cells)} cells of {plan.target} from {e.sizes[0] / 1e6:.0f}M to "
        f"{e.sizes[1] / 1e6:.0f}M parameters, "
        f"{e.budgets[0]:.2g}x to {e.budgets[1]:.2g}x tokens. {e.attribution}".strip(),
        "Cost: the optimizer's own FLOPs and bytes by matrix, the engine's ownership plan for this layout, and "
        "the cluster file "
        f"{plan.cluster.name} ({'; '.join(plan.cluster.sources)}).",
        units.caveat(plan.before),
        "Times carry the cluster file's uncertainty, which the speedup's interval does not include; the "
        "optimizer's share of a step "
        f"is {plan.after.optimizer_share:.1%}, so an error of half in it moves the speedup by "
        f"{plan.after.optimizer_share / 2:.1%}.",
        *e.notes,
    ]
    return Section("How this was worked out", blocks=[Items(sentences)])


def as_dict(plan: Plan) -> dict[str, Any]:
    """The numbers behind the report."""
    decided, decision = advice.verdict(plan), decide(plan)
    return {
        "from": plan.source,
        "to": plan.target,
        "cluster": plan.cluster.name,
        "gpus": plan.gpus,
        "tokens": plan.tokens,
        "chinchilla": plan.chinchilla,
        "step_time_ratio": plan.ratio,
        "token_speedup": vars(plan.token_speedup),
        "wall_clock_speedup": vars(plan.speedup),
        "chance_of_saving_time": plan.chance,
        "gpu_hours": plan.hours,
        "gpu_hours_saved": decision.expected,
        "value_of_certainty": decision.perfect,
        "experiments": [vars(item) for item in decision.experiments],
        "flags": plan.flags,
        "refused": plan.refused,
        "extrapolates": plan.extrapolates,
        "risks": [vars(risk) for risk in advice.risks(plan)],
        "verdict": vars(decided),
        "before": units.as_dict(plan.before),
        "after": units.as_dict(plan.after),
    }
