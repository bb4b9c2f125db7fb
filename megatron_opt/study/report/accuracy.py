"""Accuracy on tasks beside the loss, and where the two put the optimizers in another order."""

from __future__ import annotations

import math
from itertools import combinations

from megatron_opt.report.blocks import Plot, Section, Series, Table, colors
from megatron_opt.study import downstream
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.downstream import Score, scores
from megatron_opt.study.fits.paired_items import ItemTest, baseline_tests, disagreements
from megatron_opt.study.fits.significance import LEVEL
from megatron_opt.study.report.scaling import p_text


def accuracy(dataset: Dataset) -> Section:
    """Each optimizer's best configuration by loss, on every task of the study; empty where no run was evaluated."""
    section = Section(
        "Accuracy on tasks",
        [
            "Of the configuration with the best validation loss, at its last checkpoint, ± one standard error over the "
            "items of the task."
        ],
    )
    results = {record.id: record.results for record in dataset.records}
    rows, orders = [], []
    points: list[tuple[str, float, dict[str, Score]]] = []
    tasks: dict[str, None] = {}
    for regime in dataset.regimes:
        scored: dict[str, tuple[float, dict[str, Score]]] = {}
        for (name, where), cell in dataset.best().items():
            mine = scores([results[run] for run in cell.ids]) if where == regime else {}
            if mine:
                scored[name] = cell.loss, mine
        for name, (loss, mine) in sorted(scored.items(), key=lambda item: item[1][0]):
            tasks |= dict.fromkeys(mine)
            points.append((name, loss, mine))
            rows.append((str(regime), name, f"{loss:.4f}", mine))
            several = [results[run] for run in dataset.best()[name, regime].ids]
            for weights in downstream.averaged(several[0]):
                if averaged := scores(several, weights):
                    rows.append((str(regime), f"{name}, {weights}", "–", averaged))
        orders += _disagreements(str(regime), scored)
    if not rows:
        return Section("Accuracy on tasks")
    section.plots += [_against_loss(dataset, task, points) for task in tasks]
    shown = [[*row[:3], *(_cell(row[3].get(task)) for task in tasks)] for row in rows]
    section.tables.append(Table(["regime", "optimizer", "valid loss", *tasks], shown))
    tests, apart = baseline_tests(dataset), disagreements(dataset)
    if not orders:
        section.text.append("The order by accuracy is the order by loss, on every task.")
    elif not apart:
        section.text += orders
    _paired(section, dataset, tests, apart, bool(orders))
    return section


def _against_loss(dataset: Dataset, task: str, points: list[tuple[str, float, dict[str, Score]]]) -> Plot:
    """Every optimizer in every regime: were accuracy a function of the loss alone, all would lie on one line."""
    color, series = colors(dataset.optimizers), []
    for name in dataset.optimizers:
        found = [(loss, mine[task]) for who, loss, mine in points if who == name and task in mine]
        if found:
            rows = [
                (loss, one.value, one.value - (one.error or 0), one.value + (one.error or 0)) for loss, one in found
            ]
            series.append(Series.of(name, color[name], rows, "low", "high", line=False))
    kind = next(mine[task].metric for *_, mine in points if task in mine)
    return Plot(f"accuracy-{task}", f"{task} against the loss, ± one standard error", "validation loss", kind, series)


def _paired(section: Section, dataset: Dataset, tests: list[ItemTest], apart: list[ItemTest], unequal: bool) -> None:
    """Tests over the same items, where the store has them."""
    if unequal and not tests and not apart:
        section.text.append(
            "Errors of differences are those of independent items; the runs' items were not kept, so that no test is paired."
        )
    if not tests and not apart:
        return
    section.text.append(
        "Tests are paired over items: McNemar's exact test, where seeds of one item count together; gained and lost are answers "
        f"that only one of the two has right. “p (Holm)” is over the table; below {1 - LEVEL:.2g} these trained models differ. "
        "“Over seeds” asks whether the optimizers would differ in other runs too, by the noise that accuracies have over seeds; "
        "it needs repeated seeds."
    )
    header = ["regime", "task", "optimizer", "accuracy", dataset.baseline, "items", "seeds", "gained", "lost", "p"]
    rows = [
        [
            str(one.regime),
            one.task,
            one.second,
            f"{one.accuracies[1]:.4f}",
            f"{one.accuracies[0]:.4f}",
            str(one.items),
            str(one.seeds),
            str(one.gained),
            str(one.lost),
            p_text(one.p),
            p_text(one.adjusted),
            p_text(one.p_seeds),
            _verdict(one),
        ]
        for one in tests
    ]
    if rows:
        header += ["p (Holm)", "over seeds (Holm)", "accuracy is"]
        section.tables.append(Table(header, rows, f"Against {dataset.baseline}, paired over items."))
    if apart:
        rows = [
            [
                str(one.regime),
                one.task,
                f"{one.first} ({one.losses[0]:.4f}), {one.second} ({one.losses[1]:.4f})",
                f"{one.second} ({one.accuracies[1]:.4f}), {one.first} ({one.accuracies[0]:.4f})",
                p_text(one.p),
                p_text(one.adjusted),
                "yes" if one.significant else "not settled",
            ]
            for one in apart
        ]
        header = ["regime", "task", "order by loss", "order by accuracy", "p", "p (Holm)", "accuracies differ"]
        section.tables.append(Table(header, rows, "Where the orders by loss and by accuracy disagree."))


def _verdict(one: ItemTest) -> str:
    if not one.significant:
        return "not settled"
    word = "higher" if one.accuracies[1] > one.accuracies[0] else "lower"
    return word if one.p_seeds is not None and one.p_seeds < 1 - LEVEL else f"{word} for these runs"


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}")


def _disagreements(regime: str, scored: dict[str, tuple[float, dict[str, Score]]]) -> list[str]:
    """A sentence for each pair and task where the lower loss has the lower accuracy."""
    said = []
    for (first, (loss, mine)), (second, (other_loss, others)) in combinations(
        sorted(scored.items(), key=lambda item: item[1][0]), 2
    ):
        for task, score in mine.items():
            other = others.get(task)
            if other is None or not score.more_is_better or other.value <= score.value or loss == other_loss:
                continue
            error = math.hypot(score.error or 0.0, other.error or 0.0)
            known = score.error is not None and other.error is not None and error > 0
            by = f", by {(other.value - score.value) / error:.1f} standard errors of the difference" if known else ""
            said.append(
                f"{regime}, {task}: by loss {first} comes before {second} ({loss:.4f} and {other_loss:.4f}), by accuracy "
                f"{second} before {first} ({other.value:.4f} and {score.value:.4f}{by})."
            )
    return said
