"""How often the study says "better": with no true difference, and with a real one, over simulated tables.

    python benchmarks/study_significance.py --draws 500

A loss is a level, a part common to all optimizers of a (regime, seed), and a part of its own. Seeds are shared, and one
more seed chose each configuration among several. The rule must say "better" anywhere in the table in at most 6% of the
draws of the null, and find a gain of .05 over two seeds (common .033, own .012) with power .85 or more.
"""

from __future__ import annotations

import argparse

import numpy as np

from megatron_opt.study.dataset import Seeded
from megatron_opt.study.fits.significance import Comparison, compare_all
from megatron_opt.study.spec import Regime

COMMON, OWN = 0.033, 0.012


def table(
    rng: np.random.Generator,
    gain: float,
    seeds: int = 2,
    optimizers: int = 3,
    regimes: int = 4,
    paired: bool = True,
    looks: int = 1,
) -> list[Comparison]:
    """One draw of a study's table: the first optimizer is the baseline, the others are better by `gain`."""
    cells = {}
    for regime in range(regimes):
        common = COMMON * rng.standard_normal((optimizers if not paired else 1, seeds))
        losses = 3.0 + common + OWN * rng.standard_normal((optimizers, seeds))
        losses[1:] -= gain
        for k in range(optimizers):
            ids = tuple(range(2, 2 + seeds)) if paired else tuple(100 * k + s for s in range(seeds))
            cells[f"o{k}", Regime(f"m{regime}", 1.0)] = Seeded(tuple(losses[k]), ids)
    names = [f"o{k}" for k in range(optimizers)]
    return compare_all(cells, "o0", names, [Regime(f"m{r}", 1.0) for r in range(regimes)], looks)


def sequential(rng: np.random.Generator, gain: float, most: int, regimes: int = 4, optimizers: int = 3) -> bool:
    """A seeds phase that stops where it is settled; whether it ever says "better"."""
    common = COMMON * rng.standard_normal((regimes, 1, most))
    losses = 3.0 + common + OWN * rng.standard_normal((regimes, optimizers, most))
    losses[:, 1:] -= gain
    held = np.full((regimes, optimizers), 2)
    names, places = [f"o{k}" for k in range(optimizers)], [Regime(f"m{r}", 1.0) for r in range(regimes)]
    for count in range(2, most + 1):
        cells = {
            (names[k], places[r]): Seeded(tuple(losses[r, k, : held[r, k]]), tuple(range(held[r, k])))
            for r in range(regimes)
            for k in range(optimizers)
        }
        results = compare_all(cells, "o0", names, places, looks=most - 1)
        for one in results:
            if not one.settled and count < most:
                r = places.index(one.regime)
                held[r, names.index(one.optimizer)] = held[r, 0] = count + 1
    return any(one.verdict == "better" for one in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    draws = parser.parse_args().draws
    print(
        "| optimizers | regimes | seeds | pairing | “better” anywhere, no difference | power, gain .05 | power, gain .03 |"
    )
    print("|---:|---:|---:|---|---:|---:|---:|")
    for optimizers, regimes, seeds, paired in (
        (2, 4, 2, True),
        (3, 4, 2, True),
        (3, 10, 2, True),
        (11, 12, 2, True),
        (3, 4, 3, True),
        (3, 4, 5, True),
        (3, 4, 2, False),
        (3, 4, 5, False),
    ):
        rng = np.random.default_rng(optimizers * 1000 + regimes * 10 + seeds)
        shape = {"optimizers": optimizers, "regimes": regimes, "seeds": seeds, "paired": paired}
        null = np.mean([any(c.verdict == "better" for c in table(rng, 0.0, **shape)) for _ in range(draws)])
        power = [
            np.mean([np.mean([c.verdict == "better" for c in table(rng, gain, **shape)]) for _ in range(draws)])
            for gain in (0.05, 0.03)
        ]
        pairing = "shared" if paired else "not shared"
        print(f"| {optimizers} | {regimes} | {seeds} | {pairing} | {null:.1%} | {power[0]:.2f} | {power[1]:.2f} |")
    rng = np.random.default_rng(1)
    for most in (3, 5):
        null = np.mean([sequential(rng, 0.0, most) for _ in range(draws)])
        print(f"Seeds one at a time, at most {most}: “better” with no difference in {null:.1%}.")


if __name__ == "__main__":
    main()
