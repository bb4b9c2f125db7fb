"""What a transfer phase found: where the best rate lies at each width, and what carrying the proxy's costs there.

The loss lost is that of the carried hyperparameters minus that of the best rate swept at the width itself, over shared seeds
other than the one on which that best was chosen. One noise and one correction hold for the whole table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_opt.study.dataset import Dataset, Seeded
from megatron_opt.study.fits.significance import Cells, Comparison, compare_pairs
from megatron_opt.study.spec import MUP, Regime
from megatron_opt.study.store import Record


@dataclass(frozen=True)
class Carried:
    """One optimizer under one parametrization at one width."""

    optimizer: str
    parametrization: str
    regime: Regime
    proxy: Regime
    width: int
    carried_lr: float
    best_lr: float | None
    """of the sweep; None where the rate was carried alone"""
    optimum: float | None
    """between the rates of the sweep: the vertex of the parabola in log(lr) through the best and its neighbours, else the best"""
    edge: bool
    """the best rate is the last that was tried"""
    curve: tuple[tuple[float, float], ...]
    """(rate, loss) of the sweep on the first seed; inf where it diverged"""
    carried_loss: float | None
    best_loss: float | None
    lost: Comparison | None
    """the best against the carried: its gain is the loss lost; None where both are one configuration or one diverged"""

    @property
    def same(self) -> bool:
        """The carried rate is the best of a sweep: nothing is lost, to within the grid."""
        return self.carried_lr == self.best_lr

    @property
    def loss_lost(self) -> float | None:
        """In nats; 0 where the carried rate is the best, inf where it diverged."""
        if self.same:
            return 0.0
        if self.best_lr is not None and self.carried_loss is None:
            return math.inf
        return None if self.lost is None else self.lost.gain


@dataclass
class Transfer:
    """All transfer phases of a study."""

    rows: list[Carried] = field(default_factory=list)
    proxies: dict[tuple[str, Regime], tuple[int, float]] = field(default_factory=dict)
    """(optimizer, proxy) → its width and the tuned rate"""
    worth: list[Comparison] = field(default_factory=list)
    """carried under µP against carried without, `optimizer` at a width: gain > 0 where µP is better"""

    @property
    def lines(self) -> list[tuple[str, str, Regime]]:
        """Optimizer, parametrization, and the proxy, from which one family of widths is reached."""
        return list(dict.fromkeys((one.optimizer, one.parametrization, one.proxy) for one in self.rows))

    def carried(self, optimizer: str, parametrization: str, proxy: Regime) -> list[Carried]:
        """What was carried from one proxy."""
        wanted = optimizer, parametrization, proxy
        return [one for one in self.rows if (one.optimizer, one.parametrization, one.proxy) == wanted]

    def optima(self, optimizer: str, parametrization: str, proxy: Regime) -> list[tuple[int, float]]:
        """(width, best rate) of the proxy and of what it was carried to, by width."""
        start = [self.proxies[optimizer, proxy]] if (optimizer, proxy) in self.proxies else []
        mine = self.carried(optimizer, parametrization, proxy)
        return sorted([*start, *((one.width, one.optimum) for one in mine if one.optimum is not None)])

    def drift(self, optimizer: str, parametrization: str, proxy: Regime) -> tuple[float, float] | None:
        """Slope of log(optimal rate) over log(width) and its standard error (NaN with two widths); None without two widths."""
        points = self.optima(optimizer, parametrization, proxy)
        x, y = (np.log(np.array(side, float)) for side in zip(*points)) if points else (np.zeros(0), np.zeros(0))
        if len(np.unique(x)) < 2:
            return None
        slope, start = np.polyfit(x, y, 1)
        freedom = len(x) - 2
        residual = math.sqrt(float(np.sum((y - slope * x - start) ** 2)) / freedom) if freedom > 0 else math.nan
        return float(slope), residual / math.sqrt(float(np.sum((x - x.mean()) ** 2)))


def transfer_of(dataset: Dataset) -> Transfer:
    """From the decisions that the scheduler recorded and the runs themselves; empty without a transfer phase."""
    transfer, table = Transfer(), {}
    drafts: list[tuple[Carried, str, str]] = []
    for step in dataset.trace:
        if step["kind"] != "transfer":
            continue
        regime, proxy, name = Regime.parse(step["regime"]), Regime.parse(step["proxy"]), step["optimizer"]
        kind = step["parametrization"]
        chosen = step["best"] or step["carried"]
        carried, best = (_runs(dataset, name, regime, hyper) for hyper in (step["carried"], chosen))
        curve = _curve(dataset, name, regime, step["carried"])
        if not carried or not best:
            continue
        keys = f"{name} {kind} carried", f"{name} {kind} best"
        for key, runs in zip(keys, (carried, best)):
            if (cell := _cell(runs, chosen_there=step["best"] is not None)) is not None:
                table[key, regime] = cell
        swept = step["best"] is not None
        optimum, edge = vertex(curve, chosen["lr"]) if swept else (None, False)
        row = Carried(
            name,
            kind,
            regime,
            proxy,
            int(carried[0].config["flags"]["hidden-size"]),
            step["carried"]["lr"],
            chosen["lr"] if swept else None,
            optimum,
            edge,
            tuple(curve),
            table[keys[0], regime].loss if (keys[0], regime) in table else None,
            table[keys[1], regime].loss if swept and (keys[1], regime) in table else None,
            None,
        )
        drafts.append((row, *keys))
        tuned = _runs(dataset, name, proxy, {k: v for k, v in step["carried"].items() if k != MUP})
        if tuned:
            transfer.proxies[name, proxy] = int(tuned[0].config["flags"]["hidden-size"]), step["carried"]["lr"]
    _compare(transfer, drafts, table, dataset)
    return transfer


def _compare(transfer: Transfer, drafts: list[tuple[Carried, str, str]], table: Cells, dataset: Dataset) -> None:
    pairs = [(best, carried, row.regime) for row, carried, best in drafts if row.best_lr not in (None, row.carried_lr)]
    cells = dict.fromkeys((row.optimizer, row.regime) for row, *_ in drafts)
    worth = [(f"{name} mup carried", f"{name} standard carried", regime) for name, regime in cells]
    tested = compare_pairs(table, [*pairs, *worth], dataset.looks, dataset.margin)
    lost = {(one.optimizer, one.regime): one for one in tested}
    transfer.rows = [replace(row, lost=lost.get((best, row.regime))) for row, _, best in drafts]
    marked = {(a, regime) for a, _, regime in worth}
    transfer.worth = [
        replace(one, optimizer=one.optimizer.split()[0]) for one in tested if (one.optimizer, one.regime) in marked
    ]


def _runs(dataset: Dataset, name: str, regime: Regime, hyper: dict[str, Any]) -> list[Record]:
    runs = [r for r in dataset.finished if (r.optimizer, r.regime, r.hyper) == (name, regime, hyper)]
    return sorted(runs, key=lambda record: record.seed)


def _curve(dataset: Dataset, name: str, regime: Regime, carried: dict[str, Any]) -> list[tuple[float, float]]:
    """(rate, loss) of what differs from the carried hyperparameters in the rate alone, on the first seed."""
    rest = {key: value for key, value in carried.items() if key != "lr"}
    by_seed: dict[int, dict[float, float]] = {}
    for r in dataset.finished:
        if (r.optimizer, r.regime) == (name, regime) and {k: v for k, v in r.hyper.items() if k != "lr"} == rest:
            by_seed.setdefault(r.seed, {})[r.hyper["lr"]] = math.inf if r.loss is None else r.loss
    return sorted(max(by_seed.values(), key=len).items()) if by_seed else []


def _cell(runs: list[Record], chosen_there: bool) -> Seeded | None:
    """Losses over seeds but the first, if the best was chosen on it; of that one alone where there are no others."""
    good = [r for r in runs if r.loss is not None]
    if not good or runs[0].loss is None:
        return None
    fair = (good[1:] or good) if chosen_there else good
    losses = tuple(r.loss or 0.0 for r in fair)
    return Seeded(losses, tuple(r.seed for r in fair), tuple(r.id for r in fair), chosen_there and len(good) < 2)


def vertex(curve: list[tuple[float, float]], best: float) -> tuple[float, bool]:
    """(rate, on an edge): the parabola's lowest point in log(rate) through the best rate and its finite neighbours."""
    rates = [rate for rate, _ in curve]
    index = rates.index(best) if best in rates else -1
    if not 0 < index < len(rates) - 1:
        return best, True
    three = curve[index - 1 : index + 2]
    if not all(math.isfinite(loss) for _, loss in three):
        return best, False
    a, b, _ = np.polyfit(np.log([rate for rate, _ in three]), [loss for _, loss in three], 2)
    return (float(math.exp(-b / (2 * a))), False) if a > 0 else (best, False)
