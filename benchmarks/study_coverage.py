"""Do the 90% intervals of loss, gain and speedup cover the truth? Simulated studies of known truth, in four worlds.

    python benchmarks/study_coverage.py --draws 200 [--world NAME …] [--first 0] [--jsonl rows.jsonl]
    python benchmarks/study_coverage.py --table rows.jsonl

A draw is a study of AdamW, Muon and SOAP at 130M, 300M and 520M parameters and 1, 2, 4, 8x tokens: a truth of that world,
and noise. Truths vary around the law fitted to the published losses (arXiv 2509.02046), exponents and κ by a factor of 1.5 (one
standard deviation), so that coverage is not that of one lucky law. Worlds: `shared`
exponents, efficiencies ρ_N and ρ_D; `separate` exponents, κ and irreducible losses;
`common` the same, with noise common to a cell and to an (optimizer, size) beside a run's own; `outside` a level whose
exponents drift with scale and gains that level off, which no fitted form can express.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_opt.study.fits.ensemble import Ensemble, fit_ensemble
from megatron_opt.study.fits.forms import FORMS, Form
from megatron_opt.study.fits.hierarchy import Noise
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.observations import Observations

NAMES = ("adamw", "muon", "soap")
SIZES, RATIOS = np.array([134217728.0, 301989888.0, 536870912.0]), np.array([1.0, 2.0, 4.0, 8.0])
TARGETS = [(n, ratio) for n in (1.2e9, 7e9) for ratio in (1.0, 8.0)]
WORLDS = ("shared", "separate", "common", "outside")
N0, D0 = 3e8, 1.6e10
Law = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(optimizer, N, D) → loss"""


@dataclass(frozen=True)
class World:
    """One truth and its noise."""

    law: Law
    run: float
    cell: float
    size: float


def world(name: str, rng: np.random.Generator) -> World:
    """A truth of a world."""
    e, a, b, kappa = 1.85, 0.23, 0.25, 0.5
    a, b, kappa = a * np.exp(0.4 * rng.normal()), b * np.exp(0.4 * rng.normal()), kappa * np.exp(0.4 * rng.normal())
    slope_n, slope_d = 0.163 * np.exp(0.03 * rng.normal()), 0.105 * np.exp(0.03 * rng.normal())
    rho = np.array([[0, 0], [0.05, 0.2], [0.0, 0.18]]) + np.array([[0, 0], [1, 1], [1, 1]]) * rng.normal(
        0, 0.04, (3, 2)
    )
    own, errors = np.zeros((3, 4)), (0.002, 0.0, 0.0)
    if name in ("separate", "common"):
        own = rng.normal(0, 1, (3, 4)) * [0.05, 0.05, 0.05, 0.01]
    if name == "common":
        errors = (0.001, 0.0015, 0.001)
    if name == "outside":
        return World(_outside(a, b, slope_n, slope_d, rng), *errors)
    total = slope_n / a + slope_d / b
    share = slope_n / a / total

    def law(k: int, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        power = kappa * np.exp(own[k, 2])
        u = share * np.exp(-a * np.exp(own[k, 0]) / power * (np.log(n / N0) + rho[k, 0]))
        v = (1 - share) * np.exp(-b * np.exp(own[k, 1]) / power * (np.log(d / D0) + rho[k, 1]))
        return e + own[k, 3] + total * (u + v) ** power

    return World(law, *errors)


def _outside(a: float, b: float, slope_n: float, slope_d: float, rng: np.random.Generator) -> Law:
    drift = rng.normal(0, 0.03, 2)
    c, left = rng.uniform(0.02, 0.04, 3), rng.uniform(0, 0.4, 3)
    p, q = rng.uniform(0.3, 0.7, 3), rng.uniform(0.3, 0.6, 3)

    def law(k: int, n: np.ndarray, d: np.ndarray) -> np.ndarray:
        x, y = np.log(n / N0), np.log(d / D0)
        level = (
            1.85 + slope_n / a * np.exp(-a * x * (1 + drift[0] * x)) + slope_d / b * np.exp(-b * y * (1 + drift[1] * y))
        )
        level = level + 0.012 * (x - y) ** 2 / (1 + (x - y) ** 2)
        gain = c[k] * (left[k] + (1 - left[k]) * np.exp(-p[k] * x)) * np.exp(-q[k] * (y - x))
        return level - (gain if k else 0.0)

    return law


def sample(truth: World, rng: np.random.Generator) -> Observations:
    """The losses of one study."""
    index, size, budget = (a.ravel() for a in np.meshgrid(range(3), range(3), range(4), indexing="ij"))
    n = SIZES[size]
    d = 20 * RATIOS[budget] * n
    loss = np.array([float(truth.law(k, m, t)) for k, m, t in zip(index, n, d)])
    cells, blocks = truth.cell * rng.standard_normal((3, 4)), truth.size * rng.standard_normal((3, 3))
    noise = truth.run * rng.standard_normal(len(loss)) + cells[size, budget] + blocks[index, size]
    return Observations(NAMES, index, n, d, loss + noise)


def tokens_for(truth: World, loss: float, n: float) -> float:
    """Tokens at which the true baseline reaches a loss; inf beyond 1e6 tokens a parameter."""
    low, high = 0.1 * n, 1e6 * n
    if float(truth.law(0, n, high)) > loss:
        return np.inf
    for _ in range(80):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if float(truth.law(0, n, middle)) > loss else (low, middle)
    return float(np.sqrt(low * high))


def one_draw(name: str, seed: int, copies: int = 400, forms: tuple[Form, ...] = FORMS) -> list[dict]:
    """Rows of what was covered by one study."""
    rng = np.random.default_rng([WORLDS.index(name), seed])
    truth = world(name, rng)
    ensemble = fit_ensemble(sample(truth, rng), Noise(0.002), copies=copies, seed=seed, forms=forms)
    return [row for n, ratio in TARGETS for row in _rows(name, seed, truth, ensemble, n, ratio)]


def _rows(name: str, seed: int, truth: World, ensemble: Ensemble, n: float, ratio: float) -> list[dict]:
    d, rows = 20 * ratio * n, []
    base = float(truth.law(0, n, d))
    for k, optimizer in enumerate(NAMES):
        loss = float(truth.law(k, n, d))
        found = {"loss": (loss, ensemble.losses(optimizer, n, d))}
        if k:
            found["gain"] = (base - loss, ensemble.gains(optimizer, n, d))
            found["speedup"] = (tokens_for(truth, loss, n) / d, ensemble.speedups(optimizer, n, d))
        for what, (value, copies) in found.items():
            low, high = (float(end) for end in interval(copies))
            rows.append(
                {
                    "world": name, "seed": seed, "n": n, "ratio": ratio, "optimizer": optimizer, "what": what,
                    "inside": bool(low <= value <= high), "low": low, "high": high, "truth": value,
                    "middle": float(np.median(copies)),
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Coverage and median width by world, target and quantity, as a table of Markdown."""
    lines = ["| world | target | loss | gain | speedup | width of the gain |", "|---|---|---:|---:|---:|---:|"]
    for name in WORLDS:
        for n, ratio in TARGETS:
            mine = [row for row in rows if (row["world"], row["n"], row["ratio"]) == (name, n, ratio)]
            if not mine:
                continue
            cells = []
            for what in ("loss", "gain", "speedup"):
                cells.append(f"{np.mean([row['inside'] for row in mine if row['what'] == what]):.1%}")
            width = np.median([row["high"] - row["low"] for row in mine if row["what"] == "gain"])
            draws = len({row["seed"] for row in mine})
            lines.append(f"| {name} ({draws} draws) | {n / 1e9:g}B, {ratio:g}x | {' | '.join(cells)} | {width:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Run draws, or print the table of finished ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="seed of the first draw")
    parser.add_argument("--jsonl", type=Path, help="append the rows here")
    parser.add_argument("--table", type=Path, help="print the table of these rows and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    rows = []
    for seed in range(options.first, options.first + options.draws):
        for name in options.world:
            found = one_draw(name, seed)
            rows += found
            if options.jsonl:
                with options.jsonl.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
    print(table(rows))


if __name__ == "__main__":
    main()
