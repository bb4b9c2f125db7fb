"""Transfer over width: the best rate at each, with and without µP, and the loss that carrying the proxy's costs."""

from __future__ import annotations

import math

from megatron_opt.report.blocks import PALETTE, Plot, Section, Series, Table, colors
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.significance import LEVEL
from megatron_opt.study.fits.transfer import Carried, Transfer, transfer_of
from megatron_opt.study.report.scaling import LOSS, interval_text, p_text, verdict_text

TITLES = {"standard": "without µP", "mup": "µP"}


def transfer_over_width(dataset: Dataset) -> Section:
    """Empty without a transfer phase."""
    section, transfer = Section("Transfer over width"), transfer_of(dataset)
    if not transfer.rows:
        return section
    section.text = [
        "Hyperparameters tuned at the proxy are carried to wider models, with µP (arXiv 2203.03466; the proxy is its base, where it "
        "changes nothing) and without; there the learning rate is swept as well. The loss lost is that of the carried values "
        "minus that of the best rate of the sweep, over seeds other than the one on which that best was chosen; "
        f"{LEVEL:.0%} intervals over shared seeds, p after Holm's correction over both tables of differences. A sweep finds an "
        "optimum to about half a step of its grid, and differences of depth between proxy and target are not µP's.",
    ]
    section.tables += [_optima(transfer), _lost(transfer)]
    if transfer.worth:
        section.tables.append(_worth(transfer))
    section.warnings += [
        f"{one.optimizer}, {one.regime}, {TITLES[one.parametrization]}: the best rate, {one.best_lr:g}, is the last that was tried."
        for one in transfer.rows
        if one.edge
    ]
    section.plots.append(_over_width(dataset, transfer))
    _curves(section, transfer)
    return section


def _optima(transfer: Transfer) -> Table:
    regimes = list(dict.fromkeys(one.regime for one in transfer.rows if one.optimum is not None))
    rows = []
    for name, kind, proxy in transfer.lines:
        mine = {one.regime: one for one in transfer.carried(name, kind, proxy)}
        if not any(regime in mine for regime in regimes):
            continue
        tuned = transfer.proxies.get((name, proxy))
        drift = transfer.drift(name, kind, proxy)
        said = "–" if drift is None else f"{drift[0]:+.2f}" + ("" if math.isnan(drift[1]) else f" ± {drift[1]:.2f}")
        cells = [_rate(mine[r].optimum if r in mine else None) for r in regimes]
        rows.append([str(proxy), name, TITLES[kind], "–" if tuned is None else f"{tuned[1]:.3g}", *cells, said])
    header = ["proxy", "optimizer", "", "tuned at the proxy", *map(str, regimes), "slope over width"]
    return Table(header, rows, "The best learning rate at each width, and d log(rate) / d log(width): 0 transfers.")


def _lost(transfer: Transfer) -> Table:
    rows = []
    for one in transfer.rows:
        lost, test = one.loss_lost, one.lost
        rows.append(
            [
                str(one.regime),
                one.optimizer,
                TITLES[one.parametrization],
                f"{one.carried_lr:g}",
                _rate(one.best_lr),
                _loss(one.carried_loss),
                "–" if one.best_lr is None else _loss(one.best_loss),
                "not known" if lost is None else "diverged" if math.isinf(lost) else f"{lost:+.4f}",
                interval_text(test),
                p_text(test.adjusted) if test else "–",
                _verdict(one),
                ", ".join(test.runs) if test else "–",
            ]
        )
    header = ["regime", "optimizer", "", "carried lr", "best lr there", "loss carried", "loss of the best", "loss lost"]
    return Table([*header, f"{LEVEL:.0%} interval", "p (Holm)", "", "runs"], rows, "What transfer loses.")


def _verdict(one: Carried) -> str:
    if one.best_lr is None:
        return "not swept"
    if one.same:
        return "the carried rate is the best"
    if one.lost is None:
        return ""
    return {"better": "loses", "worse": "carried is better"}.get(one.lost.verdict, one.lost.verdict) + (
        f": {one.lost.why}" if one.lost.why else ""
    )


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _worth(transfer: Transfer) -> Table:
    rows = [
        [
            str(one.regime),
            one.optimizer,
            f"{one.gain:+.4f}",
            interval_text(one),
            p_text(one.adjusted),
            verdict_text(one),
        ]
        for one in transfer.worth
    ]
    header = ["regime", "optimizer", "gain of µP", f"{LEVEL:.0%} interval", "p (Holm)", "µP is"]
    return Table(header, rows, "Carried with µP against carried without.")


def _over_width(dataset: Dataset, transfer: Transfer) -> Plot:
    color, series = colors(dataset.optimizers), []
    several = len({proxy for *_, proxy in transfer.lines}) > 1
    for name, kind, proxy in transfer.lines:
        points = transfer.optima(name, kind, proxy)
        label = f"{name}, {TITLES[kind]}" + (f", {proxy.model}" if several else "")
        x, y = [float(w) for w, _ in points], [lr for _, lr in points]
        series.append(Series(label, x, y, color[name], dash=kind == "standard"))
    title = "Best learning rate against width (dashed: without µP)"
    return Plot("transfer-optimum", title, "width", "best learning rate", series, x_log=True, y_log=True)


def _curves(section: Section, transfer: Transfer) -> None:
    """Loss over the rate at every width, one figure for each optimizer and parametrization; dotted: the carried rate."""
    for name, kind in dict.fromkeys((name, kind) for name, kind, _ in transfer.lines):
        mine = [one for one in transfer.rows if (one.optimizer, one.parametrization) == (name, kind) and one.best_lr]
        series = [
            Series.of(str(one.regime), PALETTE[i % len(PALETTE)], points)
            for i, one in enumerate(mine)
            if (points := [point for point in one.curve if math.isfinite(point[1])])
        ]
        if series:
            title, rates = f"{name}, {TITLES[kind]}: loss over the rate", dict.fromkeys(one.carried_lr for one in mine)
            carried = [(rate, "carried") for rate in rates]
            section.plot(f"transfer-{name}-{kind}", title, "learning rate", LOSS, series, x_log=True, vertical=carried)
