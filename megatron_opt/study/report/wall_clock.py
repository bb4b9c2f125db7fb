"""Speedups in tokens and in time, side by side: on the machine that ran the study, and on a cluster by the cost model."""

from __future__ import annotations

import math

from megatron_opt.report.blocks import Section, Series, Table, colors
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.significance import LEVEL
from megatron_opt.study.fits.statement import Estimate
from megatron_opt.study.fits.wall_clock import Reached, TimeSpeedup, WallClock


def tokens_and_time(dataset: Dataset, wall: WallClock) -> Section:
    """Times to final losses, and token speedups over ratios of step times; empty where no time is known."""
    section = Section("Tokens and time")
    if wall.reached:
        _reached(section, dataset, wall)
    if wall.speedups:
        _speedups(section, dataset, wall)
    if wall.target and wall.cluster:
        _target(section, dataset, wall)
    elif wall.cluster and wall.cluster.target and section.tables:
        said = ", ".join(f"{name} {ratio:.3f}" for name, ratio in wall.cluster.target.items())
        section.text.append(
            f"At {dataset.target[0]:.3g} parameters on {wall.cluster.name} a step takes, over {dataset.baseline}'s: {said} (the cost "
            "model, in the layout of the nearest usual Llama on 64 GPUs). No law says what tokens are worth there."
        )
    if wall.cluster:
        section.text += wall.cluster.notes
    return section


def _reached(section: Section, dataset: Dataset, wall: WallClock) -> None:
    base, there = dataset.baseline, wall.cluster.name if wall.cluster else None
    section.text.append(
        f"Until a run's validation loss is at {base}'s final loss of the same seed: tokens, and seconds of training steps on the "
        "machine that ran it (no start, no evaluation; runs that shared a machine slowed each other). The loss is "
        "interpolated between evaluations. A schedule that ended there would have got there sooner, so that these speedups are "
        f"on the low side. Intervals are {LEVEL:.0%}, of a spread over seeds that is pooled over the table."
        + (f" On {there}: the same tokens at the cost model's time of a token, taken as exact." if there else "")
    )
    rows = [
        [
            str(one.regime),
            one.optimizer,
            f"{one.target:.4f}",
            *([one.why, "–", "–"] if one.tokens is None else _numbers(one.tokens, one.seconds, one.baseline_seconds)),
            *_ends(one, wall, one.tokens),
        ]
        for one in wall.reached
    ]
    header = ["regime", "optimizer", "target loss", "tokens to it", "seconds to it", f"{base}'s seconds"]
    tail = ["speedup in tokens", "speedup in time"]
    tail += [f"GPU-seconds to it, {there}", f"speedup in time, {there}"] if there else []
    tail += ["seeds", "evaluations", "runs"]
    section.tables.append(Table([*header, *tail], rows, f"Time to the final loss of {base}."))
    if wall.behind:
        rows = [
            [
                str(one.regime),
                one.optimizer,
                f"{one.target:.4f}",
                *_numbers(one.baseline_tokens, one.baseline_seconds, one.seconds),
                *_ends(one, wall, one.baseline_tokens, base),
            ]
            for one in wall.behind
        ]
        header = ["regime", "optimizer", "its final loss", "tokens to it", "seconds to it", "its seconds", *tail]
        caption = f"Of those that never reach it: time of {base} to their own final loss. These speedups are on the high side."
        section.tables.append(Table(header, rows, caption))


def _numbers(*values: float | None) -> list[str]:
    return ["–" if value is None else f"{value:.3g}" for value in values]


def _ends(one: Reached, wall: WallClock, tokens: float | None, who: str | None = None) -> list[str]:
    """Speedups and what they rest on; `tokens`: of `who` until both are at the loss, which a cluster would take its time for."""
    cells = [estimate(one.in_tokens), estimate(one.in_time)]
    if wall.cluster:
        a_token = wall.cluster.a_token.get((who or one.optimizer, one.regime))
        ratio = wall.cluster.measured.get((one.optimizer, one.regime))
        cells += _numbers(None if tokens is None or a_token is None else tokens * a_token)
        cells.append(estimate(one.in_tokens.over(ratio) if one.in_tokens and ratio else None))
    return [*cells, str(len(one.seeds)), str(one.evaluations), ", ".join(one.runs)]


def _speedups(section: Section, dataset: Dataset, wall: WallClock) -> None:
    there = wall.cluster.name if wall.cluster else None
    names = {float(record.parameters): record.regime.model for record in dataset.records}
    section.text.append(
        f"By whole schedules: tokens {dataset.baseline} needs for the same final loss (the section on token speedups), over the "
        "ratio of seconds a token. Intervals are 90%, both errors added."
        + (f" On {there}: ratio of steps by the cost model, taken as exact." if there else "")
    )
    header = ["optimizer", "model", "ratio", "speedup in tokens", "seconds a token, here", "speedup in time, here"]
    header += [f"seconds a step, {there}", f"speedup in time, {there}"] if there else []
    rows = []
    for one in wall.speedups:
        row = [one.optimizer, names[one.n], f"{one.d / one.n / dataset.tokens_per_parameter:.3g}x"]
        row += [one.tokens.text(3), estimate(one.ratio), estimate(one.here)]
        row += [_factor(one.cluster_ratio), estimate(one.there)] if there else []
        rows.append(row)
    section.tables.append(Table(header, rows, "Token speedups in time."))
    _draw(section, dataset, wall)


def _draw(section: Section, dataset: Dataset, wall: WallClock) -> None:
    """Token and time speedups against size, of the lowest ratio that has several sizes."""
    color, per = colors(dataset.optimizers), dataset.tokens_per_parameter
    for ratio in sorted({round(one.d / one.n / per, 1) for one in wall.speedups}):
        mine = [one for one in wall.speedups if round(one.d / one.n / per, 1) == ratio and one.here]
        if len({one.n for one in mine}) < 2:
            continue
        series = []
        for name in dict.fromkeys(one.optimizer for one in mine):
            points = sorted((one for one in mine if one.optimizer == name), key=lambda one: one.n)
            x = [one.n for one in points]
            series.append(Series(f"{name}, tokens", x, [one.tokens.value for one in points], color[name], dash=True))
            series.append(Series(f"{name}, time", x, [one.here.value for one in points if one.here], color[name]))
        name, title = f"time-speedup-{ratio:g}x", f"Speedups in tokens (dashed) and in time here, {ratio:g}x"
        level = [(1.0, "no gain")]
        section.plot(name, title, "non-embedding parameters", "speedup", series, x_log=True, horizontal=level)


def _target(section: Section, dataset: Dataset, wall: WallClock) -> None:
    assert wall.cluster is not None
    rows = [_row(one, dataset.tokens_per_parameter) for one in wall.target]
    header = ["optimizer", "parameters", "ratio", "speedup in tokens", "seconds a step", "speedup in time"]
    where = f"At the target on {wall.cluster.name}"
    section.tables.append(
        Table(header, rows, f"{where}: the hierarchical law's tokens over the cost model's step, 90%.")
    )


def _row(one: TimeSpeedup, per: float) -> list[str]:
    ratio = f"{one.d / one.n / per:.3g}x"
    return [
        one.optimizer,
        f"{one.n:.3g}",
        ratio,
        one.tokens.text(2),
        _factor(one.cluster_ratio),
        estimate(one.there, 2),
    ]


def _factor(value: float | None) -> str:
    return "–" if value is None else f"× {value:.3f}"


def estimate(one: Estimate | None, digits: int = 3) -> str:
    """Value and interval, or the value alone where nothing was repeated."""
    if one is None:
        return "–"
    return f"{one.value:.{digits}f}" if math.isnan(one.low) else one.text(digits)
