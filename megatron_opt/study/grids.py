"""Search grids and starts of every rule for `grid: default`: the paper's where it has them, else those of this file.

Of rules that came later no grid is published: shared hyperparameters have the paper's values, a rule's own are around its
paper's. `NAME_h` has NAME's, without decay and with learning rates that are relative steps.
"""

from __future__ import annotations

from typing import Any

from megatron_opt.study.hyperparameters import PAPER_GRIDS, PAPER_STARTS

Space = tuple[dict[str, list], dict[str, Any]]  # grid, start

_SHARED: dict[str, list] = {
    key: PAPER_GRIDS["adamw"][key] for key in ("batch_size", "warmup", "weight_decay", "clip_grad")
}
_SHARED_START = {"batch_size": 128, "warmup": 2000, "weight_decay": 0.1, "clip_grad": 1.0}
_ADAM_LR = PAPER_GRIDS["adamw"]["lr"]
_SCALARS = {
    key: PAPER_GRIDS["muon"][key] for key in ("scalar_lr_ratio", "beta1", "beta2")
}  # AdamW's, of the other matrices
_SCALARS_START = {key: PAPER_STARTS["muon"][key] for key in _SCALARS}
_FACTORS = {key: PAPER_GRIDS["soap"][key] for key in ("shampoo_beta", "block_size", "precondition_frequency")}
_FACTORS_START = {"shampoo_beta": 0.95, "block_size": 256, "precondition_frequency": 10}
_H_LR = [0.005, 0.01, 0.02, 0.04]  # arXiv 2606.16899's range


def _space(grid: dict[str, list], start: dict[str, Any]) -> Space:
    return {**grid, **_SHARED}, _SHARED_START | start


_OWN: dict[str, Space] = {
    "ademamix": _space(
        {
            "lr": [0.001, 0.002, 0.004, 0.008, 0.016],
            "beta1": [0.9, 0.95],
            "beta2": [0.95, 0.98, 0.99, 0.999],
            "beta3": [0.99, 0.999, 0.9999],
            "alpha": [2.0, 5.0, 8.0],
        },
        {"lr": 0.004, "beta1": 0.9, "beta2": 0.98, "beta3": 0.999, "alpha": 5.0},
    ),
    "adopt": _space(
        {"lr": [0.002, *_ADAM_LR], "beta1": [0.9, 0.95, 0.98], "beta2": [0.98, 0.99, 0.999, 0.9999], "eps": [1e-15, 1e-10, 1e-6]},
        {"lr": 0.008, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6},
    ),
    "schedule_free": _space(
        {"lr": [0.001, 0.002, *_ADAM_LR], "beta1": [0.9, 0.95, 0.98], "beta2": [0.95, 0.98, 0.99, 0.999], "eps": [1e-15, 1e-10, 1e-8]},
        {"lr": 0.008, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "schedule": "constant"},
    ),
    "prodigy": _space(
        {"lr": [0.5, 1.0, 2.0, 4.0], "beta1": [0.9, 0.95, 0.98], "beta2": [0.95, 0.98, 0.99, 0.999]},
        {"lr": 1.0, "beta1": 0.9, "beta2": 0.99},
    ),
    "signum": _space(
        {"lr": PAPER_GRIDS["lion"]["lr"], "beta1": [0.9, 0.95, 0.98, 0.99]}, {"lr": 0.001, "beta1": 0.95}
    ),
    "shampoo": _space(
        {"lr": PAPER_GRIDS["soap"]["lr"], "beta1": [0.8, 0.9, 0.95], **_FACTORS}, {"lr": 0.008, "beta1": 0.95, **_FACTORS_START}
    ),
    "kl_shampoo": _space(
        {"lr": PAPER_GRIDS["soap"]["lr"], "beta1": [0.8, 0.9, 0.95], **_FACTORS}, {"lr": 0.008, "beta1": 0.95, **_FACTORS_START}
    ),
    "kl_soap": _space(
        {"lr": PAPER_GRIDS["soap"]["lr"], "beta1": [0.8, 0.9, 0.95], "beta2": PAPER_GRIDS["soap"]["beta2"], **_FACTORS},
        {"lr": 0.008, "beta1": 0.95, "beta2": 0.98, **_FACTORS_START},
    ),
    "soap_muon": _space(
        {"lr": PAPER_GRIDS["muon"]["lr"], **_SCALARS, **_FACTORS}, {"lr": 0.016, **_SCALARS_START, **_FACTORS_START}
    ),
    "dion": _space(
        {
            "lr": PAPER_GRIDS["muon"]["lr"],
            "momentum": [0.9, 0.95, 0.98],
            "rank_fraction": [0.25, 0.5, 1.0],
            **_SCALARS,
        },
        {"lr": 0.016, "momentum": 0.95, "rank_fraction": 0.25, **_SCALARS_START},
    ),
    **{
        name: _space(
            {"lr": PAPER_GRIDS["muon"]["lr"], "momentum": [0.9, 0.95, 0.98], "fraction": [0.25, 0.5, 1.0], **_SCALARS},
            {"lr": 0.016, "momentum": 0.95, "fraction": 0.25, **_SCALARS_START},
        )
        for name in ("dion2", "dion3")
    },
}  # fmt: skip


def default_space(optimizer: str) -> Space | None:
    """Grid and start of a rule by name; None for one of another package."""
    if optimizer in PAPER_GRIDS:
        return PAPER_GRIDS[optimizer], PAPER_STARTS[optimizer]
    if optimizer in _OWN:
        return _OWN[optimizer]
    inner = "adamw" if optimizer == "adam_h" else optimizer.removesuffix("_h")
    found = default_space(inner) if optimizer.endswith("_h") else None
    if found is None:
        return None
    undecayed = ({k: v for k, v in part.items() if k != "weight_decay"} for part in found)
    grid, start = undecayed
    return grid | {"lr": _H_LR}, start | {"lr": 0.02}
