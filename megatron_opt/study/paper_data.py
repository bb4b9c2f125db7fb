"""The published study as a data set: 11 optimizers, 130M to 520M parameters, 1x to 8x (arXiv 2509.02046)."""

from __future__ import annotations

import csv
import io
import json
import re
from importlib import resources
from typing import Any

from megatron_opt.study.dataset import Dataset
from megatron_opt.study.spec import Regime
from megatron_opt.study.store import Record

ATTRIBUTION = (
    "Losses, hyperparameters and ablations of Wen, Hall, Ma and Liang, “Fantastic Pretraining "
    "Optimizers and Where to "
    "Find Them”, arXiv 2509.02046, from the public result files of marin-community/marin. Nothing "
    "was trained here."
)
DIVERGED_BY = 1.0
"""an ablation this far above its base run counts as diverged"""

HYPERBALL_SIZE = 1.3e8
"""nominal: the source names the size 130M and gives no count"""
HYPERBALL_ATTRIBUTION = (
    "Losses of Muon with and without Hyperball at 130M, arXiv 2606.16899, from its public runs. "
    "Nothing was trained here."
)

_NAMES = {
    "b1": "beta1",
    "b2": "beta2",
    "gn": "clip_grad",
    "max_grad_norm": "clip_grad",
    "bsz": "batch_size",
    "wd": "weight_decay",
    "block": "block_size",
    "freq": "precondition_frequency",
    "plr": "preconditioner_lr",
    "lr_pc": "preconditioner_lr",
    "p": "update_probability",
    "p_pc": "update_probability",
    "flat_start": "update_flat_start",
    "adam_lr_ratio": "scalar_lr_ratio",
    "normgrad": "normalize_grads",
    "signum_b1": "beta1",
}


def _read(name: str) -> str:
    return (resources.files("megatron_opt") / "study" / "paper" / name).read_text(encoding="utf-8")


def paper_dataset() -> Dataset:
    """The tuned cells and the published one-factor ablations, three decimals as printed."""
    rows = list(csv.DictReader(io.StringIO(_read("paper_losses.csv"))))
    hyper, ablations = json.loads(_read("paper_hparams.json")), json.loads(_read("paper_ablations.json"))
    records = []
    for row in rows:
        name, scale, ratio = row["optimizer"], row["scale"], row["chinchilla"]
        ablation = ablations.get(f"{name}/{scale}/{ratio}x")
        cell = hyper.get(name, {}).get(scale, {}).get(f"{ratio}x", {})
        base = _renamed(ablation["base_config"] if ablation else cell.get("hparams", {}))
        records.append(_record(row, "", base, float(row["loss_best_seen"])))
        for change, loss in (ablation["ablations"] if ablation else {}).items():
            key, _, text = change.partition("=")
            value = _value(text)
            if value is None:
                continue
            bad = loss > ablation["base_loss"] + DIVERGED_BY
            records.append(
                _record(
                    row,
                    f"-{change}",
                    base | {_NAMES.get(key, key): value},
                    None if bad else round(float(loss), 3),
                )
            )
    return Dataset("published study", "adamw", records, attribution=ATTRIBUTION, effort_known=False)


def hyperball_dataset() -> Dataset:
    """Muon with and without Hyperball at one size over seven budgets (arXiv 2606.16899), Muon as the baseline."""
    records = []
    for row in csv.DictReader(io.StringIO(_read("hyperball_130m_datascaling.csv"))):
        tokens = float(row["tokens_B"]) * 1e9
        lr = re.search(r"-lr([\d.]+e-?\d+)-", row["run"])
        records.append(
            Record(
                id=row["run"],
                optimizer=row["optimizer"],
                regime=Regime("130m", tokens / (20 * HYPERBALL_SIZE)),
                seed=0,
                hyper={"lr": float(lr[1])} if lr else {},
                config={"source": "hyperball_130m_datascaling.csv"},
                arguments=[],
                parameters=int(HYPERBALL_SIZE),
                tokens=int(tokens),
                status="completed",
                loss=float(row["best_loss"]),
            )
        )
    return Dataset("Hyperball at 130M", "muon", records, attribution=HYPERBALL_ATTRIBUTION, effort_known=False)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(key, key): value for key, value in values.items()}


def _value(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _record(row: dict[str, str], suffix: str, hyper: dict[str, Any], loss: float | None) -> Record:
    name, scale, ratio = row["optimizer"], row["scale"], row["chinchilla"]
    return Record(
        id=f"{name}-{scale}-{ratio}x{suffix}",
        optimizer=name,
        regime=Regime(scale, float(ratio)),
        seed=0,
        hyper=hyper,
        config={"source": row["source"]},
        arguments=[],
        parameters=int(row["nonembed_params"]),
        tokens=int(row["tokens"]),
        status="diverged" if loss is None else "completed",
        loss=loss,
    )
