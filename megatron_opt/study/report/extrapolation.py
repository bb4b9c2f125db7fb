"""What the laws predict where nobody has trained, how well they did on held-out runs, what to run next."""

from __future__ import annotations

import numpy as np

from megatron_opt.study.analysis import Analysis
from megatron_opt.study.fits.extrapolate import Estimate
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.report.plots import Plot, Section, Series, Table, colors
from megatron_opt.study.report.scaling import law_table


def prediction_error(analysis: Analysis) -> Section:
    """Parameters of the laws, their leave-one-out error and their error on the held-out largest size."""
    section = Section(
        "How good are the laws?",
        warnings=[text for fit in analysis.fits.values() for text in fit.diagnosis()],
    )
    rows = []
    for kind, fit in analysis.fits.items():
        section.tables.append(law_table(fit))
        errors, held = analysis.left_out[kind], analysis.held_out.get(kind)
        rows.append(
            [
                kind,
                fit.form,
                f"{np.sqrt(np.mean(fit.residuals**2)):.4f}",
                f"{np.sqrt(np.nanmean(errors**2)):.4f}",
                "–" if held is None else f"{held.rmse:.4f}",
                "–" if held is None else f"{held.coverage:.0%}",
            ]
        )
        if held is not None:
            section.plots.append(_held_out(analysis, kind))
    if rows:
        section.tables.insert(
            0,
            Table(
                [
                    "law",
                    "form",
                    "residual",
                    "leave-one-out error",
                    "error at the held-out largest size",
                    "in its 90% interval",
                ],
                rows,
                "Root-mean-square errors of the final loss.",
            ),
        )
    return section


def _held_out(analysis: Analysis, kind: str) -> Plot:
    held = analysis.held_out[kind]
    color, series = colors(analysis.dataset.optimizers), []
    for k in np.unique(held.data.index):
        mask, name = held.data.index == k, held.data.optimizers[k]
        series.append(
            Series(
                name,
                held.data.loss[mask].tolist(),
                held.predicted[mask].tolist(),
                color[name],
                line=False,
                low=held.low[mask].tolist(),
                high=held.high[mask].tolist(),
                runs=[run for run, keep in zip(held.data.runs, mask) if keep],
            )
        )
    ends = [float(held.data.loss.min()), float(held.data.loss.max())]
    series.append(Series("prediction = outcome", ends, ends, "#888888", points=False, dash=True))
    return Plot(
        f"held-out-{kind}",
        f"Largest size, predicted without it ({kind})",
        "observed loss",
        "predicted loss",
        series,
    )


def extrapolation(analysis: Analysis) -> Section:
    """Loss and gain at the target by both laws, crossing points, and the most informative next run."""
    if not analysis.fits:
        return Section("Extrapolation")
    n, _ = analysis.target
    section = Section(
        f"Extrapolation to {n:.3g} parameters",
        [
            "Both kinds of law, side by side: where they disagree, the data do not settle the "
            "question. Intervals are 90% "
            "and hold if the form of the law holds."
        ],
    )
    section.warnings = [note for note in analysis.notes if note.startswith("The target")]
    per, color = analysis.dataset.tokens_per_parameter, colors(analysis.dataset.optimizers)
    rows = []
    for e in analysis.extrapolations:
        rows.append(
            [
                e.kind,
                f"{e.d / e.n / per:g}x",
                e.optimizer,
                _show(e.loss, 3),
                _show(e.gain, 4),
                _show(e.speedup, 2),
            ]
        )
    section.tables.append(Table(["law", "ratio", "optimizer", "loss", "gain over baseline", "token speedup"], rows))
    for kind in analysis.fits:
        series = []
        for name in analysis.data.optimizers[1:]:
            mine = [e for e in analysis.extrapolations if e.kind == kind and e.optimizer == name]
            series.append(
                Series(
                    name,
                    [e.d / e.n / per for e in mine],
                    [e.gain.value for e in mine],
                    color[name],
                    low=[e.gain.low for e in mine],
                    high=[e.gain.high for e in mine],
                )
            )
        section.plots.append(
            Plot(
                f"gain-{kind}",
                f"Predicted gain at {n:.3g} parameters ({kind} law)",
                "Chinchilla ratio",
                "loss below the baseline",
                series,
                x_log=True,
                horizontal=[(0.0, "no gain")],
            )
        )
        section.plots.append(_gain_over_size(analysis, kind))
    section.tables.append(
        Table(
            ["law", "optimizer", "ratio", "size of zero gain", "90% interval", "resamples that cross"],
            [
                [
                    c.kind,
                    c.optimizer,
                    f"{c.ratio:g}x",
                    _size(c.n),
                    f"{_size(c.low)} to {_size(c.high)}",
                    f"{c.share:.0%}",
                ]
                for c in analysis.crossings
            ],
            "Where an optimizer's gain over the baseline reaches zero.",
        )
    )
    rows = []
    for name, runs in analysis.next_runs.items():
        rows += [
            [
                name,
                run.optimizer,
                f"{run.n:.3g}",
                f"{run.ratio:g}x",
                f"{run.flops:.2g}",
                f"{run.shrinkage:.1%}",
            ]
            for run in runs[:3]
        ]
    if rows:
        section.tables.append(
            Table(
                ["gain of", "train", "parameters", "ratio", "FLOPs", "interval shrinks by"],
                rows,
                "The single further run that would narrow the predicted gain most (shared law, first "
                "ratio of the target).",
            )
        )
    return section


def _gain_over_size(analysis: Analysis, kind: str) -> Plot:
    fit, color = analysis.fits[kind], colors(analysis.dataset.optimizers)
    n, ratios = analysis.target
    grid = np.geomspace(analysis.data.sizes[0], max(n, analysis.data.sizes[-1]) * 2, 30)
    tokens = ratios[0] * analysis.dataset.tokens_per_parameter * grid
    base, series = fit.optimizers[0], []
    for name in fit.optimizers[1:]:
        draws = fit.predict_draws(base, grid, tokens) - fit.predict_draws(name, grid, tokens)
        low, high = interval(draws)
        value = fit.predict(base, grid, tokens) - fit.predict(name, grid, tokens)
        series.append(
            Series(
                name,
                grid.tolist(),
                value.tolist(),
                color[name],
                points=False,
                low=low.tolist(),
                high=high.tolist(),
            )
        )
    return Plot(
        f"gain-over-size-{kind}",
        f"Gain against size at {ratios[0]:g}x ({kind} law)",
        "non-embedding parameters",
        "loss below the baseline",
        series,
        x_log=True,
        horizontal=[(0.0, "no gain")],
        vertical=[(float(analysis.data.sizes[-1]), "largest run")],
    )


def _show(e: Estimate, digits: int) -> str:
    def one(value: float) -> str:
        return "∞" if np.isinf(value) else f"{value:.{digits}f}"

    return f"{one(e.value)} ({one(e.low)} to {one(e.high)})"


def _size(n: float) -> str:
    return "none below 1e13" if np.isinf(n) else f"{n:.2g}"
