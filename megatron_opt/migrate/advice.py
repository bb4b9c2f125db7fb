"""From a plan to risks and a verdict; every threshold is here."""

from dataclasses import dataclass

from megatron_opt.cost_model.tables import unconditioned
from megatron_opt.migrate.decision import decide
from megatron_opt.migrate.plan import Plan

SURE, LIKELY = 0.95, 0.75  # probability of saving time from which an advice is sure, or likely
WORTH = 1.02  # wall-clock speedup below which a change is not worth its work


@dataclass(frozen=True)
class Risk:
    """What may go wrong: `high`, `medium` or `low`, and where that is seen."""

    severity: str
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """What to do: `switch`, `try` or `stay`, how sure that is, and the sentence that says so."""

    action: str
    confidence: str
    sentence: str


def verdict(plan: Plan) -> Verdict:
    """The recommendation, from refusals, memory, the chance of saving time, and how far the evidence reaches."""
    name, chance = plan.target, plan.chance
    speed = plan.speedup
    interval = f"{speed.value:.2f}× wall-clock, 90% interval {speed.low:.2f} to {speed.high:.2f}"
    if plan.refused:
        return Verdict(
            "stay",
            "high",
            f"Do not switch as things are: {len(plan.refused)} of the run's flags are refused with {name}. Mend "
            "them and plan again.",
        )
    if not plan.fits and not (plan.layouts and plan.layouts.steps):
        return Verdict("stay", "high", f"Do not switch: {name} does not fit on {plan.gpus} GPUs in any layout.")
    layout = "" if plan.fits else f" It needs another layout: {plan.layouts.steps[0].layout.name()}."  # type: ignore[union-attr]
    far = bool(plan.extrapolates) or plan.done > 0
    decision = decide(plan)
    if decision.best is not None:
        best = decision.best
        return Verdict(
            "try",
            "low" if far else "medium",
            f"Measure before deciding on {name}: expected {interval}; an experiment of {best.hours:,.0f} GPU-hours raises "
            f"the expected saving from {max(0.0, decision.expected):,.0f} to {best.saving:,.0f} GPU-hours and changes the "
            f"decision with a chance of {best.changes:.0%}.{layout}",
        )
    told = f"expected {interval}, {chance:.0%} chance of saving time; no experiment is worth its price"
    if decision.expected > 0 and speed.value >= WORTH:
        sure = "high" if chance >= SURE else "medium" if chance >= LIKELY else "low"
        if far:
            sure = {"high": "medium"}.get(sure, "low")
        return Verdict("switch", sure, f"Switch to {name}: {told}.{layout}")
    return Verdict("stay", "medium" if far or chance > 1 - LIKELY else "high", f"Stay with {plan.source}: {told}.")


def risks(plan: Plan) -> list[Risk]:
    """What is seen in the data, the laws, the memory and the plan."""
    listed = [
        Risk("high", sentence + ": every number on its gain is an extrapolation.") for sentence in plan.extrapolates
    ]
    listed += _of_evidence(plan) + _of_machine(plan)
    if plan.done:
        listed.append(
            Risk(
                "medium",
                f"The laws describe runs from the start; {plan.done:.0%} of this one is done. The gain is taken "
                "to hold for the "
                "remaining tokens, which no published study has measured.",
            )
        )
    order = {"high": 0, "medium": 1, "low": 2}
    return sorted(listed, key=lambda risk: order[risk.severity])


def _of_evidence(plan: Plan) -> list[Risk]:
    evidence, seen = plan.evidence, []
    by_size: dict[float, list[float]] = {}
    for cell in evidence.cells:
        by_size.setdefault(cell.n, []).append(cell.value)
    if len(by_size) > 1:
        means = {n: sum(values) / len(values) for n, values in sorted(by_size.items())}
        first, last = min(means), max(means)
        if means[last] < means[first] - 0.03:
            seen.append(
                Risk(
                    "medium",
                    f"The gain shrinks with size: {means[first]:.2f}× tokens at {first / 1e6:.0f}M, "
                    f"{means[last]:.2f}× at {last / 1e6:.0f}M parameters.",
                )
            )
    counted = [method for method in evidence.methods if method.counted]
    values = [method.estimate.value for method in counted]
    if len(values) > 1 and max(values) / min(values) > 1.1:
        words = ", ".join(f"{m.name} {m.estimate.value:.2f}×" for m in counted)
        seen.append(Risk("high", f"Ways to extrapolate disagree: {words}. The interval spans both."))
    if evidence.cliff:
        tuned, bad, regime = evidence.cliff
        seen.append(
            Risk(
                "medium",
                f"A cliff is near the tuned learning rate: at {regime}, {tuned:g} is best and {bad:g} is far "
                "worse or diverges.",
            )
        )
    lr, law = plan.given.get("lr"), evidence.source_lr
    if lr and law and law.low and law.high and not law.low / 2 <= lr <= law.high * 2:
        seen.append(
            Risk(
                "high" if lr < law.low / 4 or lr > law.high * 4 else "medium",
                f"The run's own learning rate {lr:g} is far from the law's {law.value:.2g} ({law.low:.2g} to "
                f"{law.high:.2g}) for "
                f"{plan.source}: part of any gain may be had by tuning {plan.source} alone. Models parametrized "
                "otherwise have other optima.",
            )
        )
    batch = plan.before.tokens / 4096
    if evidence.tuned_batch and not 0.5 <= batch / evidence.tuned_batch <= 2:
        seen.append(
            Risk(
                "low" if batch > evidence.tuned_batch else "medium",
                f"The study tuned at {evidence.tuned_batch:.0f} sequences of 4096 tokens, this run has "
                f"{batch:.0f}; the best learning rate moves with the batch.",
            )
        )
    return seen


def _of_machine(plan: Plan) -> list[Risk]:
    after, seen = plan.after, []
    used = after.memory.total / plan.cluster.memory
    if used > 1:
        seen.append(
            Risk(
                "high",
                f"Memory: {after.memory.total / 1e9:.1f} GB of {plan.cluster.memory / 1e9:.0f} GB; the layout "
                "must change.",
            )
        )
    elif used > 0.9:
        seen.append(
            Risk("medium", f"Memory: {used:.0%} of a GPU is predicted to be used; the prediction is good to about 10%.")
        )
    if after.refresh_step > 1.2 * after.ordinary:
        every, times = after.optimizer.refresh_every, after.refresh_step / after.ordinary
        remedy = "; --soap-stagger spreads that" if plan.target == "soap" else ""
        sentence = f"Steps are uneven: one in {every:g} takes {times:.2f}× an ordinary one{remedy}."
        seen.append(Risk("low", sentence))
    idle = unconditioned(after)
    if idle > 0.05:
        seen.append(
            Risk(
                "high" if idle > 0.5 else "medium",
                f"{idle:.0%} of the parameters get no matrix work because their sides exceed the rule's limit; "
                "the study's models had none.",
            )
        )
    if after.optimizer.imbalance > 1.5 and after.optimizer_share > 0.03:
        seen.append(
            Risk(
                "low",
                f"The most loaded owner has {after.optimizer.imbalance:.1f}× the mean work: fewer matrices than "
                "ranks share well.",
            )
        )
    if not plan.cluster.measured:
        seen.append(
            Risk(
                "low",
                f"Rates of {plan.cluster.name} are estimates from data sheets; `megatron-opt cost calibrate` on "
                "the machine replaces them.",
            )
        )
    return seen
