"""Final losses against model size and tokens, with the fitted laws; speedups; efficiency factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_opt.report.blocks import Section, Series, Table, colors
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.scaling import Fit
from megatron_opt.study.fits.significance import LEVEL, Comparison
from megatron_opt.study.fits.speedups import Speedup

LOSS, SIZE = "final validation loss", "non-embedding parameters"


def final_losses(analysis: Analysis) -> Section:
    """Loss over tokens at each size and over size at each ratio; curves are the shared law."""
    section = Section("Final loss against size and tokens")
    fit = analysis.ensemble
    data, color = analysis.data, colors(analysis.dataset.optimizers)
    if fit is not None:
        section.text.append(
            f"Points are runs, curves the median of the hierarchical law; a loss scatters around it by {fit.noise:.4f}."
        )
    for size in data.sizes:
        cells = data.where(data.n == size)
        if len(np.unique(cells.d)) < 2:
            continue
        series = []
        grid = np.geomspace(cells.d.min() / 1.3, cells.d.max() * 1.3, 40)
        for k in np.unique(cells.index):
            name, mine = data.optimizers[k], cells.where(cells.index == k)
            series.append(_points(name, mine.d, mine.loss, color[name], list(mine.runs)))
            if fit is not None:
                series.append(_curve(grid, np.median(fit.losses(name, size, grid), 0), color[name]))
        name, title = f"loss-against-tokens-{size:.3g}", f"Final loss against tokens, {size:,.0f} parameters"
        section.plot(name, title, "tokens", LOSS, series, x_log=True)
    ratios = np.round(data.d / data.n / analysis.dataset.tokens_per_parameter, 1)
    for ratio in np.unique(ratios):
        cells = data.where(ratios == ratio)
        if len(cells.sizes) < 2:
            continue
        grid = np.geomspace(cells.n.min() / 1.3, cells.n.max() * 1.3, 40)
        series = []
        for k in np.unique(cells.index):
            name, mine = data.optimizers[k], cells.where(cells.index == k)
            series.append(_points(name, mine.n, mine.loss, color[name], list(mine.runs)))
            if fit is not None:
                tokens = grid * ratio * analysis.dataset.tokens_per_parameter
                series.append(_curve(grid, np.median(fit.losses(name, grid, tokens), 0), color[name]))
        section.plot(
            f"loss-against-size-{ratio:g}x", f"Final loss against size, {ratio:g}x", SIZE, LOSS, series, x_log=True
        )
    return section


def gains(analysis: Analysis) -> Section:
    """Losses minus the baseline's: against size at each ratio, and as a table, each with its runs."""
    per, baseline = analysis.dataset.tokens_per_parameter, analysis.data.optimizers[0]
    section = Section(
        "Loss minus the baseline's",
        [
            f"Final loss of {baseline} minus that of each optimizer in the same regime: above zero is better. Bars are "
            f"{LEVEL:.0%} intervals where seeds were repeated; curves are the median of the hierarchical law."
        ],
    )
    sizes = {record.regime: float(record.parameters) for record in analysis.dataset.records}
    color, fit = colors(analysis.dataset.optimizers), analysis.ensemble
    once = [c for c in analysis.comparisons if c.regime.epochs == 1]
    for ratio in sorted({c.regime.ratio for c in once}):
        mine = [c for c in once if c.regime.ratio == ratio]
        positions = np.array(sorted({sizes[c.regime] for c in mine}))
        series = []
        for name in analysis.data.optimizers[1:]:
            points = sorted((c for c in mine if c.optimizer == name), key=lambda c: sizes[c.regime])
            if not points:
                continue
            one = Series.of(
                name, color[name], [(sizes[c.regime], c.gain, " ".join(c.runs)) for c in points], "runs", line=False
            )
            if any(c.low is not None for c in points):
                one.low = [c.gain if c.low is None else c.low for c in points]
                one.high = [c.gain if c.high is None else c.high for c in points]
            series.append(one)
            if fit is not None and len(positions) > 1 and name in fit.optimizers:
                grid = np.geomspace(positions[0] / 1.3, positions[-1] * 1.3, 40)
                series.append(_curve(grid, np.median(fit.gains(name, grid, ratio * per * grid), 0), color[name]))
        title, below = f"Loss below {baseline}'s against size, {ratio:g}x", f"loss below {baseline}'s"
        lines = [(0.0, "no gain")]
        section.plot(f"gain-against-size-{ratio:g}x", title, SIZE, below, series, x_log=True, horizontal=lines)
    return section if section.plots else Section(section.title)


def _points(name: str, x: np.ndarray, y: np.ndarray, color: str, runs: list[str]) -> Series:
    return Series(name, x.tolist(), y.tolist(), color, line=False, runs=runs or None)


def _curve(x: np.ndarray, y: np.ndarray, color: str) -> Series:
    return Series("", x.tolist(), y.tolist(), color, points=False)


def speedup_section(analysis: Analysis) -> Section:
    """Token speedup over the baseline: against the ratio at each size, and against size at each ratio."""
    baseline = analysis.data.optimizers[0]
    section = Section(
        "Token speedup",
        [
            f"Tokens {baseline} needs for the same loss, over the tokens spent; 1 is no gain. A "
            "speedup in tokens, not in seconds. Intervals are 90%. Hollow points on hatched intervals need more tokens of "
            f"{baseline} than it was ever given at that size: its L(D) is extrapolated there, and the interval spans that "
            "law's and the hierarchical law's."
        ],
    )
    if not analysis.speedups:
        return Section("Token speedup")
    color = colors(analysis.dataset.optimizers)
    names = {record.parameters: record.regime.model for record in analysis.dataset.records}
    per = analysis.dataset.tokens_per_parameter
    data, others = analysis.data, analysis.data.optimizers[1:]
    behind = {(data.optimizers[k], n, d): run for k, n, d, run in zip(data.index, data.n, data.d, data.runs)}

    finite = [_drawable(s) for s in analysis.speedups if np.isfinite([s.value, s.low]).all()]

    def draw(label: str, against: str, x_label: str, chosen: list[Speedup], x: Callable[[Speedup], float]) -> None:
        lines = []
        for name in others:
            mine = sorted((s for s in chosen if s.optimizer == name), key=x)
            rows = [(x(s), s.value, s.low, s.high, s.beyond, behind.get((s.optimizer, s.n, s.d), "")) for s in mine]
            if rows:
                lines.append(Series.of(name, color[name], rows, "low", "high", "beyond", "runs"))
        if lines and len(lines[0].x) > 1:
            title, level = f"Speedup against {against}, {label}", [(1.0, "no gain")]
            section.plot(f"speedup-{label}", title, x_label, "token speedup", lines, x_log=True, horizontal=level)

    for size in analysis.data.sizes:
        mine = [s for s in finite if s.n == size]
        draw(names.get(int(size), f"{size:.3g}"), "ratio", "Chinchilla ratio", mine, lambda s: s.d / s.n / per)
    for ratio in sorted({round(s.d / s.n / per, 1) for s in analysis.speedups}):
        mine = [s for s in finite if round(s.d / s.n / per, 1) == ratio]
        draw(f"{ratio:g}x", "size", SIZE, mine, lambda s: s.n)
    rows = [
        [
            s.optimizer,
            names.get(int(s.n), f"{s.n:.3g}"),
            f"{s.d / s.n / per:.3g}x",
            f"{s.value:.3f}",
            f"{s.low:.3f} to {s.high:.3f}",
            ("own L(D)" if s.method == "size" else "hierarchical law") + (", extrapolated" if s.beyond else ""),
            behind.get((s.optimizer, s.n, s.d), "–"),
        ]
        for s in analysis.speedups
    ]
    section.table(["optimizer", "model", "ratio", "speedup", "90% interval", "by", "runs"], rows)
    return section


def _drawable(one: Speedup) -> Speedup:
    """An upper end at infinity (the baseline may never get there) is drawn at twice the value."""
    return one if np.isfinite(one.high) else replace(one, high=2 * one.value, beyond=True)


def significance(analysis: Analysis) -> Section:
    """Whether each difference to the baseline exceeds the noise, and how many seeds would settle it."""
    noise, own, looks = analysis.noise, analysis.own_noise, analysis.dataset.looks
    section = Section("Is the difference real?")
    if own.freedom:
        section.text.append(
            f"Own noise of one final loss, beside what a seed does to all optimizers alike: {own.sigma:.4f} "
            f"({own.freedom} degrees of freedom, pooled over this table). Gains are means over shared seeds."
        )
    if noise.measured:
        low, high = noise.interval()
        section.text.append(
            f"Total noise over seeds: {noise.sigma:.4f} (90% interval {low:.4f} to {high:.4f}, {noise.freedom} degrees of "
            "freedom)."
        )
    else:
        section.text.append(
            "No configuration has two seeds beside the one that chose it: the noise is not known, and nothing can be said "
            "of a single difference."
        )
    section.text.append(
        f"“Better” and “worse” mean p < {1 - LEVEL:.2g} after Holm's correction for the {len(analysis.comparisons)} rows of "
        f"this table; “alike”, that the {LEVEL:.0%} interval (not corrected) lies within ±{analysis.dataset.margin:g}. Seeds "
        "needed are shared ones, for 80% power."
        + (
            f" The seeds phase may look {looks} times: p is multiplied, and intervals widened, by that."
            if looks > 1
            else ""
        )
    )
    rows = [
        [
            str(c.regime),
            c.optimizer,
            f"{c.gain:+.4f}",
            interval_text(c),
            p_text(c.p),
            p_text(c.adjusted),
            verdict_text(c),
            str(c.seeds_needed or "–"),
            f"{len(c.seeds)} shared" if c.paired else "not shared",
            ", ".join(c.runs),
        ]
        for c in analysis.comparisons
    ]
    header = ["regime", "optimizer", "gain over baseline", f"{LEVEL:.0%} interval", "p", "p (Holm)", "verdict"]
    section.table([*header, "seeds needed", "seeds", "runs"], rows)
    return section


def interval_text(test: Comparison | None) -> str:
    """Of a gain; a dash where there is none."""
    return "–" if test is None or test.low is None else f"{test.low:+.4f} to {test.high:+.4f}"


def verdict_text(test: Comparison) -> str:
    """The verdict, with the reason where nothing can be said."""
    return test.verdict + (f": {test.why}" if test.why else "")


def p_text(p: float | None) -> str:
    """A p-value to two digits; none is known more closely than 0.0001."""
    return "–" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def law_table(fit: Fit) -> Table:
    """The parameters of a fit with 90% intervals from its bootstrap copies."""
    if fit.kind == "shared":
        rows = []
        for name in fit.optimizers:
            rho = fit.efficiency(name)
            copies = np.array([fit.efficiency(name, theta) for theta in fit.draws])
            low, high = interval(copies)
            rows.append([name, *(f"{rho[i]:.3f} ({low[i]:.3f} to {high[i]:.3f})" for i in (0, 1))])
        return Table(
            ["optimizer", "ρ_N (size)", "ρ_D (tokens)"],
            rows,
            f"Shared {fit.form} law: the baseline needs ρ_N times the parameters and ρ_D times the tokens.",
        )
    rows = []
    for block, name in enumerate(fit.optimizers):
        cells = [name]
        for column in (0, 2, 4, 5):
            value, copies = fit.theta[block, column], fit.draws[:, block, column]
            if column in (0, 5):
                value, copies = np.exp(value), np.exp(copies)
            low, high = interval(copies)
            cells.append(f"{value:.3f} ({low:.3f} to {high:.3f})")
        rows.append(cells)
    return Table(["optimizer", "E", "a (size)", "b (tokens)", "κ"], rows, f"Separate {fit.form} laws.")
