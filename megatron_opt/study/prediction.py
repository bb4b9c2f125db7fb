"""The one law of a study's losses, from which fits, reports, migration plans, speedups and registered predictions are quoted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Dataset, from_store
from megatron_opt.study.fits.ensemble import Ensemble, fit_ensemble
from megatron_opt.study.fits.hierarchy import Noise
from megatron_opt.study.fits.noise import DEFAULT_FLOOR, NoiseFloor, noise_floor
from megatron_opt.study.fits.observations import Observations, observations
from megatron_opt.study.paper_data import paper_dataset
from megatron_opt.study.store import Store


@dataclass(frozen=True)
class Evidence:
    """A study's table of losses with its noise; `dataset` is None where only exported fits are known."""

    name: str
    data: Observations
    noise: NoiseFloor
    dataset: Dataset | None

    @property
    def tokens_per_parameter(self) -> float:
        """Of 1x, by the study; 20 where only its fits are known."""
        return 20.0 if self.dataset is None else self.dataset.tokens_per_parameter

    def law(self, baseline: str | None = None) -> Ensemble:
        """The hierarchical law in all its forms; gains are over `baseline` (default: the study's)."""
        return law_of(
            self.data if baseline in (None, self.data.optimizers[0]) else self.data.rebased(baseline), self.noise
        )


def law_of(data: Observations, floor: NoiseFloor) -> Ensemble:
    """The hierarchical law of a table of losses; raises UserError for too few of them."""
    return fit_ensemble(data, prior_noise(floor))


def prior_noise(floor: NoiseFloor) -> Noise:
    """What is known of a run's noise: a measured σ is a total over seeds, so that a run's own part may be smaller."""
    return Noise(floor.sigma, max(0.25, 1 / math.sqrt(2 * floor.freedom)) if floor.measured else 0.5)


def load(study: str | Path | None) -> Evidence:
    """A study's folder, its store, its fits as JSON, or (None) the published study; raises UserError."""
    if study is None:
        dataset = paper_dataset()
        return Evidence(dataset.name, observations(dataset), noise_floor(dataset), dataset)
    path = Path(study)
    if path.is_dir():
        stores = sorted([*path.glob("*.sqlite"), *path.glob("*.db")])
        if not stores:
            raise UserError(
                f"{study} holds no study store; give the folder of a study, its store, or its fits as JSON."
            )
        path = stores[0]
    if path.suffix == ".json":
        return _from_json(path)
    if not path.is_file():
        raise UserError(f"{study} does not exist; give the folder of a study, its store, or its fits as JSON.")
    with Store(path) as store:
        dataset = from_store(store)
    return Evidence(dataset.name, observations(dataset), noise_floor(dataset), dataset)


def _from_json(path: Path) -> Evidence:
    try:
        content = json.loads(path.read_text())
        rows = content["observations"]
        names = list(dict.fromkeys([content["baseline"], *(row["optimizer"] for row in rows)]))
        seeds = tuple(frozenset(row["seeds"]) for row in rows if row.get("seeds"))
        data = Observations(
            tuple(names),
            np.array([names.index(row["optimizer"]) for row in rows]),
            np.array([float(row["parameters"]) for row in rows]),
            np.array([float(row["tokens"]) for row in rows]),
            np.array([float(row["loss"]) for row in rows]),
            tuple(str(row.get("run", "")) for row in rows),
            seeds if len(seeds) == len(rows) else (),
        )
        known = content.get("noise", {})
        noise = NoiseFloor(float(known.get("sigma") or DEFAULT_FLOOR), int(known.get("freedom") or 0))
        return Evidence(str(content.get("name", path.stem)), data, noise, None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of fits ({error}); write one with `megatron-opt study fit`.") from error
