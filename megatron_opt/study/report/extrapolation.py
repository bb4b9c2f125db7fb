"""What can be said where nobody has trained, how well that was foretold on held-out sizes, and what to run next."""

from __future__ import annotations

import numpy as np

from megatron_opt.report.blocks import Plot, Section, Series, Table, colors
from megatron_opt.study.analysis import Analysis
from megatron_opt.study.fits.ensemble import Backtest, Ensemble
from megatron_opt.study.fits.gain_law import GainCheck
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.report.scaling import law_table

BELOW = "loss below the baseline"


def verdict(analysis: Analysis) -> Section:
    """What was measured and what is predicted, in plain words, which the page opens with."""
    statement, baseline = analysis.statement, analysis.data.optimizers[0]
    text = measured(analysis)
    if statement is not None:
        text += statement.sentences()
        text += [c.sentence(statement.baseline) for c in statement.crossings if c.ratio == statement.ratios[0]]
    text.append(
        f"A gain is how much lower the final loss is than {baseline}'s, in nats a token; a token speedup of 1.2 means that "
        f"{baseline} needs 1.2 times the tokens for the same loss. A 90% interval is meant to hold the truth nine times in "
        "ten."
    )
    return Section("What can be said", text)


def measured(analysis: Analysis) -> list[str]:
    """One sentence an optimizer on the regimes that were run: in how many it is better, worse, alike or open."""
    sentences = []
    words = {"better": "better", "worse": "worse", "alike": "alike", "not settled": "not settled"}
    for name in analysis.data.optimizers[1:]:
        mine = [c for c in analysis.comparisons if c.optimizer == name]
        if not mine:
            continue
        gains = [c.gain for c in mine]
        counts = [f"{word} in {n}" for key, word in words.items() if (n := sum(c.verdict == key for c in mine))]
        silent = sum(c.verdict == "cannot be said" for c in mine)
        if silent:
            counts.append(f"not tested in {silent}, where no seed was repeated")
        sentences.append(
            f"Measured: {name} against {analysis.data.optimizers[0]} is {', '.join(counts)} of {len(mine)} regimes; its final "
            f"loss is lower by {min(gains):+.4f} to {max(gains):+.4f}."
        )
    return sentences


def prediction_error(analysis: Analysis) -> Section:
    """Backtests of the hierarchical law cell by cell, then parameters and errors of the diagnostic laws."""
    section = Section(
        "How good are the laws?",
        warnings=[text for fit in analysis.fits.values() for text in fit.diagnosis()],
    )
    rows = []
    if analysis.ensemble is not None:
        section.text += list(analysis.statement.calibration) if analysis.statement else []
        for test in analysis.ensemble.backtests:
            sizes = f"{test.sizes} size{'s'[: test.sizes > 1]}"
            rows.append(_score(test, f"hierarchical, {sizes} → next"))
        if analysis.simple is not None:
            rows.append(_simple_score(analysis.ensemble.backtests[-1], analysis.simple))
    for kind, fit in analysis.fits.items():
        section.tables.append(law_table(fit))
        errors, backtest = analysis.left_out[kind], analysis.held_out.get(kind)
        rows.append(
            [
                f"{kind}, {fit.form} (diagnostic)",
                "–" if backtest is None else f"{backtest.rmse:.4f}",
                "–" if backtest is None else f"{backtest.coverage:.0%}",
                "–",
                "–",
                "–" if np.isnan(errors).all() else f"{np.sqrt(np.nanmean(errors**2)):.4f}",
            ]
        )
        if backtest is not None:
            section.plots.append(_held_out(analysis, kind))
    if rows:
        inside = "in 90% interval"
        header = ["law", "error of held-out losses", inside, "error of gains", inside, "leave-one-out"]
        caption = (
            "Root-mean-square errors on a size predicted from the smaller ones; intervals include the noise of a run."
        )
        section.tables.insert(0, Table(header, rows, caption))
    if analysis.ensemble is not None and analysis.ensemble.backtests:
        section.plots.insert(0, _held_out_gains(analysis, analysis.ensemble.backtests[-1]))
    if analysis.ensemble is not None:
        weights = [[name, f"{weight:.0%}"] for name, weight in analysis.ensemble.weights.items()]
        caption = "Forms of law and their weights, by the predictive score on the largest size left out."
        section.tables.insert(1, Table(["form", "weight"], weights, caption))
        section.tables += [_cells(analysis, test) for test in analysis.ensemble.backtests[-1:]]
    return section


def _score(test: Backtest, name: str) -> list[str]:
    low, high = test.intervals("loss")
    inside = np.mean((test.data.loss >= low) & (test.data.loss <= high))
    others = np.isfinite(test.gain_error)
    gain_low, gain_high = test.intervals("gain")
    hit = ((test.observed_gain >= gain_low) & (test.observed_gain <= gain_high))[others]
    return [
        f"{name} ({test.factor:.2g} times larger)",
        f"{np.sqrt(np.mean(test.error**2)):.4f}",
        f"{inside:.0%}",
        f"{np.sqrt(np.mean(test.gain_error[others] ** 2)):.4f}",
        f"{hit.sum()} of {len(hit)}",
        "–",
    ]


def _simple_score(test: Backtest, simple: GainCheck) -> list[str]:
    gain = test.observed_gain[simple.rows]
    hit = (gain >= simple.low) & (gain <= simple.high)
    error = f"{np.sqrt(np.mean((simple.predicted - gain) ** 2)):.4f}"
    return ["simple law of the gain, c·N^−p·(D/N)^−q", "–", "–", error, f"{hit.sum()} of {len(hit)}", "–"]


def _cells(analysis: Analysis, test: Backtest) -> Table:
    """The last backtest, one row a held-out gain."""
    low, high = test.intervals("gain")
    predicted = np.median(test.gain, 0)
    rows = []
    for i in np.flatnonzero(np.isfinite(test.gain_error)):
        gain = test.observed_gain[i]
        rows.append(
            [
                test.data.optimizers[test.data.index[i]],
                f"{test.data.d[i] / test.data.n[i] / analysis.dataset.tokens_per_parameter:.3g}x",
                f"{test.data.loss[i]:.4f}",
                f"{test.data.loss[i] + test.error[i]:.4f}",
                f"{gain:+.4f}",
                f"{predicted[i]:+.4f}",
                f"{low[i]:+.4f} to {high[i]:+.4f}",
                "yes" if low[i] <= gain <= high[i] else "no",
                test.data.runs[i] if test.data.runs else "–",
            ]
        )
    header = ["optimizer", "ratio", "loss", "predicted", "gain", "predicted gain", "90% interval", "inside", "run"]
    return Table(header, rows, f"Backtest: {test.data.n.max():,.0f} parameters predicted from the smaller sizes.")


def _held_out_gains(analysis: Analysis, test: Backtest) -> Plot:
    """Predicted against observed gain of the last backtest."""
    low, high = test.intervals("gain")
    predicted = np.median(test.gain, 0)
    color, series = colors(analysis.dataset.optimizers), []
    shown = np.isfinite(test.gain_error)
    for k in np.unique(test.data.index[shown]):
        rows = np.flatnonzero(shown & (test.data.index == k))
        name = test.data.optimizers[k]
        points = zip(*(column[rows].tolist() for column in (test.observed_gain, predicted, low, high)))
        one = Series.of(name, color[name], points, "low", "high", line=False)
        one.runs = [test.data.runs[i] for i in rows] if test.data.runs else None
        series.append(one)
    series.append(_diagonal(test.observed_gain[shown]))
    title = f"Held-out gains: {test.data.n.max():,.0f} parameters, predicted from the smaller sizes"
    return Plot("held-out-gains", title, "observed gain", "predicted gain, 90% interval", series)


def _held_out(analysis: Analysis, kind: str) -> Plot:
    backtest = analysis.held_out[kind]
    color, series = colors(analysis.dataset.optimizers), []
    for k in np.unique(backtest.data.index):
        mask, name = backtest.data.index == k, backtest.data.optimizers[k]
        points = zip(
            *(column[mask].tolist() for column in (backtest.data.loss, backtest.predicted, backtest.low, backtest.high))
        )
        one = Series.of(name, color[name], points, "low", "high", line=False)
        one.runs = [run for run, keep in zip(backtest.data.runs, mask) if keep]
        series.append(one)
    series.append(_diagonal(backtest.data.loss))
    title = f"Largest size, predicted without it ({kind}, diagnostic)"
    return Plot(f"held-out-{kind}", title, "observed loss", "predicted loss", series)


def _diagonal(observed: np.ndarray) -> Series:
    ends = [float(observed.min()), float(observed.max())]
    return Series("prediction = outcome", ends, ends, "#888888", points=False, dash=True)


def extrapolation(analysis: Analysis) -> Section:
    """Loss, gain, speedup and P(gain > 0) at the target, sizes of zero gain, and the most informative next run."""
    statement, ensemble = analysis.statement, analysis.ensemble
    if statement is None or ensemble is None:
        return Section("Extrapolation")
    section = Section(
        f"Extrapolation to {statement.n:.3g} parameters",
        [
            "By the hierarchical law over all forms, widened by backtests. Dashed curves of gain against size are the shared "
            "and the separate laws: diagnostics, with intervals that simulations show to be wrong far from the data."
        ],
    )
    per, color = analysis.dataset.tokens_per_parameter, colors(analysis.dataset.optimizers)
    rows = [
        [
            f"{p.d / p.n / per:g}x",
            p.optimizer,
            p.loss.text(3),
            p.gain.text(4),
            "–" if p.optimizer == statement.baseline else f"{p.chance:.0%}",
            p.speedup.text(2),
        ]
        for p in statement.predictions
    ]
    section.table(["ratio", "optimizer", "loss", "gain over baseline", "P(gain > 0)", "token speedup"], rows)
    series = []
    for name in analysis.data.optimizers[1:]:
        mine = [p for p in statement.predictions if p.optimizer == name]
        points = [(p.d / p.n / per, p.gain.value, p.gain.low, p.gain.high) for p in mine]
        series.append(Series.of(name, color[name], points, "low", "high"))
    title = f"Predicted gain at {statement.n:.3g} parameters"
    section.plot("gain", title, "Chinchilla ratio", BELOW, series, x_log=True, horizontal=[(0.0, "no gain")])
    section.plots.append(_gain_over_size(analysis, ensemble))
    section.table(
        ["optimizer", "ratio", "decay p of N^−p", "size of zero gain", "90% interval", "probability below 1e13"],
        [
            [
                c.optimizer,
                f"{c.ratio:g}x",
                "–" if np.isnan(c.decay.value) else c.decay.text(2),
                _size(c.n),
                f"{_size(c.low)} to {_size(c.high)}",
                f"{c.ever:.0%}",
            ]
            for c in statement.crossings
        ],
        "How an optimizer's gain changes between the measured sizes, and where it reaches zero.",
    )
    rows = [
        [name, run.optimizer, f"{run.n:.3g}", f"{run.ratio:g}x", f"{run.flops:.2g}", f"{run.shrinkage:.1%}"]
        for name, runs in analysis.next_runs.items()
        for run in runs[:3]
    ]
    section.table(
        ["gain of", "train", "parameters", "ratio", "FLOPs", "interval shrinks by"],
        rows,
        "The single further run that would narrow the predicted gain most (first ratio of the target).",
    )
    return section


def _gain_over_size(analysis: Analysis, ensemble: Ensemble) -> Plot:
    color, data = colors(analysis.dataset.optimizers), analysis.data
    n, ratios = analysis.target
    grid = np.geomspace(data.sizes[0], max(n, data.sizes[-1]) * 2, 30)
    tokens = ratios[0] * analysis.dataset.tokens_per_parameter * grid
    series = []
    for name in ensemble.optimizers[1:]:
        gains = ensemble.gains(name, grid, tokens)
        points = zip(*(column.tolist() for column in (grid, np.median(gains, 0), *interval(gains))))
        series.append(Series.of(name, color[name], points, "low", "high", points=False))
        for fit in analysis.fits.values():
            value = fit.predict(ensemble.optimizers[0], grid, tokens) - fit.predict(name, grid, tokens)
            series.append(Series("", grid.tolist(), value.tolist(), color[name], points=False, dash=True))
    return Plot(
        "gain-over-size",
        f"Gain against size at {ratios[0]:g}x",
        "non-embedding parameters",
        BELOW,
        series,
        x_log=True,
        horizontal=[(0.0, "no gain")],
        vertical=[(float(data.sizes[-1]), "largest run")],
    )


def _size(n: float) -> str:
    return "none below 1e13" if np.isinf(n) else f"{n:.2g}"
