"""Predictions that are written before the run: a dated file with the digest of the data behind it and of itself.

A file is never replaced, and none is written for a regime where a run was ever started. The store notes each file's digest, so
that one changed by hand afterwards is refused when it is scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opt.errors import UserError
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.fits.ensemble import Ensemble
from megatron_opt.study.fits.intervals import interval
from megatron_opt.study.fits.noise import NoiseFloor
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.scaling import fit_law
from megatron_opt.study.fits.statement import predict, state
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import FINISHED, Record, Store

FORMAT = "megatron-opt study prediction, version 1"
META = "registered"
"""key under which a store notes file, digest, date and regimes of each prediction"""
LEVELS = tuple((i + 0.5) / 99 for i in range(99))
"""quantiles of an outcome that a file holds: enough for its CRPS to three digits"""
HYPOTHESES = {
    "law": "the gain changes with size as the hierarchical law says (the study's own prediction)",
    "kept": "the token speedup of the largest measured size is kept",
    "shared": "the gain follows the shared law, constant ρ_N and ρ_D (arXiv 2602.07712)",
    "vanished": "no gain is left",
}


@dataclass(frozen=True)
class Target:
    """A regime to be predicted."""

    regime: Regime
    n: float
    d: float


def targets_of(store: Store, wanted: Sequence[str] | None, more: Sequence[str] = ()) -> list[Target]:
    """Regimes by name, or those that the study file asks predictions for; raises UserError for unknown models.

    `more`: NAME=PARAMETERS of models that the store does not know, such as the next size after an import.
    """
    sizes: dict[str, int] = store.meta("models", {})
    for text in more:
        name, _, size = text.partition("=")
        try:
            sizes[name] = round(float(size))
        except ValueError:
            sizes[name] = 0
        if sizes[name] <= 0:
            raise UserError(f"--models {text}: write NAME=PARAMETERS, such as 7b=6.48e9")
    sizes |= {record.regime.model: record.parameters for record in store.runs()}
    names = wanted if wanted is not None else store.meta("to_register", [])
    if not names:
        raise UserError(
            "no regimes to predict: give `--regimes MODEL@RATIO`, or mark a phase of the study file with `registered: true`"
        )
    targets = []
    for name in names:
        regime = Regime.parse(name)
        if regime.model not in sizes:
            raise UserError(f"{name} names no model of the study; it has {', '.join(sizes)}")
        if regime.epochs > 1:
            raise UserError(f"{name} repeats its tokens, and no law here predicts that; name regimes of one epoch")
        n = float(sizes[regime.model])
        targets.append(Target(regime, n, regime.ratio * store.meta("tokens_per_parameter", 20.0) * n))
    return targets


def refuse_late(records: Sequence[Record], targets: Sequence[Target]) -> None:
    """Raise UserError when a run of a target was ever started: its curve may have been seen."""
    wanted = {target.regime for target in targets}
    begun = [r for r in records if r.regime in wanted and (r.status != "planned" or r.attempts > 0)]
    if begun:
        raise UserError(
            f"{begun[0].regime} has {len(begun)} started or finished runs ({begun[0].id} is {begun[0].status}); a prediction "
            "is registered before the first of them, so predict other regimes, or use `study verify` on held-out ones"
        )


def data_digest(records: Sequence[Record]) -> str:
    """SHA-256 of all that fits read of finished runs."""
    rows = sorted(
        [r.id, r.optimizer, r.regime.model, r.regime.ratio, r.seed, r.hyper, r.parameters, r.tokens, r.status, r.loss]
        for r in records
        if r.status in FINISHED
    )
    return _digest(rows)


def own_digest(content: dict[str, Any]) -> str:
    """SHA-256 of a file's content without the digest itself."""
    return _digest({key: value for key, value in content.items() if key != "sha256"})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make(
    dataset: Dataset, data: Observations, floor: NoiseFloor, law: Ensemble, targets: Sequence[Target]
) -> dict[str, Any]:
    """The content of a file of predictions."""
    run, size = _noises(law)
    try:
        shared = fit_law(data, "shared", noise=floor.sigma, resamples=200)
    except UserError:
        shared = None  # too few results for it: one hypothesis less
    rng, rows = np.random.default_rng(0), []
    for target in targets:
        for name in law.optimizers:
            said = predict(law, name, target.n, target.d)
            losses = law.losses(name, target.n, target.d)
            row = {
                "optimizer": name,
                "regime": str(target.regime),
                "parameters": target.n,
                "tokens": target.d,
                "loss": asdict(said.loss),
                "gain": asdict(said.gain),
                "speedup": asdict(said.speedup),
                "chance_of_a_gain": said.chance,
                "outcome_loss": _outcome(losses + law.noise * rng.standard_normal(len(losses))),
            }
            if name != law.optimizers[0]:
                spread = np.sqrt(2 * (run**2 + size**2))
                row["outcome_gain"] = {
                    key: _outcome(values + spread * rng.standard_normal(len(values)))
                    for key, values in _hypotheses(law, shared, name, target).items()
                }
            rows.append(row)
    statement = [
        state(law, n, tuple(t.regime.ratio for t in targets if t.n == n), dataset.tokens_per_parameter)
        for n in dict.fromkeys(t.n for t in targets)
    ]
    content = {
        "format": FORMAT,
        "study": dataset.name,
        "baseline": law.optimizers[0],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "regimes": [str(t.regime) for t in targets],
        "words": [sentence for one in statement for sentence in one.sentences()],
        "calibration": list(law.calibration.sentences()),
        "forms": law.weights,
        "noise": {"run": run, "size": size, "loss": law.noise},
        "hypotheses": HYPOTHESES,
        "levels": [round(level, 4) for level in LEVELS],
        "predictions": rows,
        "data": {"runs": sorted(r.id for r in dataset.finished), "sha256": data_digest(dataset.finished)},
    }
    content = _plain(content)
    return content | {"sha256": own_digest(content)}


def register(store: Store, path: Path, content: dict[str, Any]) -> None:
    """Write a file that was not there before, and note it in the store."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
    except FileExistsError:
        raise UserError(
            f"{path} is there already; a registered prediction is not replaced, so give another name by --to (both are kept)"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --to") from None
    entry = {key: content[key] for key in ("sha256", "written", "regimes")} | {"file": str(path.resolve())}
    store.set_meta(META, [*store.meta(META, []), entry])


def predictions(store: Store, files: Sequence[Path] | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Each file of predictions and what it says: these files, else all that the store has registered."""
    chosen = files or [Path(entry["file"]) for entry in store.meta(META, [])]
    return [(path, read(path, store)) for path in chosen]


def read(path: Path, store: Store | None = None) -> dict[str, Any]:
    """A file of predictions; raises UserError when it is not one, was changed, or is not the one that the store knows."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(content["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of predictions ({error}); write one with `study predict`") from None
    if own_digest(content) != content.get("sha256"):
        raise UserError(f"{path} was changed after it was written: its digest does not match; restore it from a copy")
    if store is not None and content["sha256"] not in {entry["sha256"] for entry in store.meta(META, [])}:
        raise UserError(f"{path} is not a prediction that was registered in {store.path}; give the one that was")
    return content


def _noises(law: Ensemble) -> tuple[float, float]:
    """Standard deviations of a run's own noise and of that common to an (optimizer, size); what is common to a cell cancels."""
    variances = np.zeros(3)
    for fit, weight in law.members:
        variances += weight * np.exp(2 * fit.phi[len(fit.form.groups) :])
    return float(np.sqrt(variances[0])), float(np.sqrt(variances[2]))


def _hypotheses(law: Ensemble, shared: Any, name: str, target: Target) -> dict[str, np.ndarray]:
    """Hypothesis → copies of the gain, without the noise of runs."""
    base, largest = law.optimizers[0], float(law.data.n.max())
    speedup = np.minimum(law.speedups(name, largest, target.d / target.n * largest), 1e3)
    kept = np.median(law.losses(base, target.n, target.d)) - np.array(
        [np.median(law.losses(base, target.n, target.d * s)) for s in np.quantile(speedup, LEVELS)]
    )
    gains = law.gains(name, target.n, target.d)
    hypotheses = {"law": gains, "kept": np.resize(kept, len(gains)), "vanished": np.zeros(len(gains))}
    if shared is not None:
        by_shared = shared.predict_draws(base, target.n, target.d) - shared.predict_draws(name, target.n, target.d)
        hypotheses["shared"] = np.resize(np.asarray(by_shared, float), len(gains))
    return hypotheses


def _outcome(copies: np.ndarray) -> dict[str, Any]:
    low, high = interval(copies)
    quantiles = np.quantile(copies, LEVELS)
    return {"low": low, "high": high, "quantiles": [round(float(q), 6) for q in quantiles]}


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that digests of what is written and of what is read are one; infinite values are null."""

    def number(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: number(one) for key, one in item.items()}
        if isinstance(item, (list, tuple)):
            return [number(one) for one in item]
        if isinstance(item, (float, np.floating)):
            return float(item) if np.isfinite(item) else None
        return item

    return json.loads(json.dumps(number(value)))
