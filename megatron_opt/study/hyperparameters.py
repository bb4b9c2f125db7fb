"""Hyperparameters of a study: which Megatron flag each one sets, and the paper's search grids.

A name the tables do not know becomes `--<optimizer>-<name>`, so one's own optimizer needs no entry here.
"""

from __future__ import annotations

import math
from typing import Any

FLAGS = {
    "lr": "lr",
    "weight_decay": "weight-decay",
    "clip_grad": "clip-grad",
    "batch_size": "global-batch-size",
    "beta1": "adam-beta1",
    "beta2": "adam-beta2",
    "eps": "adam-eps",
    "init_method_std": "init-method-std",
    "z_loss": "z-loss-coeff",
    "router_z_loss": "moe-z-loss-coeff",
}
"""hyperparameter → Megatron flag, for every optimizer that OPTIMIZER_FLAGS does not name"""

OPTIMIZER_FLAGS: dict[str, dict[str, str]] = {
    "lion": {"beta1": "lion-beta1", "beta2": "lion-beta2"},
    "sophia": {"beta1": "sophia-beta1", "beta2": "sophia-beta2"},
}
"""optimizer → hyperparameter → flag, where the optimizer has its own"""

SCHEDULE = ("schedule", "warmup", "decay", "min_lr_ratio")
"""hyperparameters that only mean something together with the run's length"""

WSD_OPTIMIZERS = ("muon", "scion", "muon_h", "scion_h")
"""stable-then-linear-decay without warmup in the paper; all others warm up and follow a cosine"""

_ADAM: dict[str, list] = {"beta1": [0.9, 0.95, 0.98], "beta2": [0.9, 0.95, 0.98]}
_SHARED: dict[str, list] = {
    "batch_size": [128, 256, 512, 1024],
    "warmup": [500, 1000, 2000, 4000],
    "weight_decay": [0.0, 0.1, 0.2],
    "clip_grad": [0.0, 1.0, 2.0],
    "eps": [1e-25, 1e-20, 1e-15, 1e-10],
}
_NO_WARMUP = {key: grid for key, grid in _SHARED.items() if key != "warmup"}

PAPER_GRIDS: dict[str, dict[str, list]] = {
    "adamw": {"lr": [0.004, 0.008, 0.016, 0.032], **_ADAM, **_SHARED},
    "nadamw": {"lr": [0.004, 0.008, 0.016, 0.032], **_ADAM, "beta1": [0.8, 0.9, 0.95, 0.98], **_SHARED},
    "cautious": {"lr": [0.004, 0.008, 0.016, 0.032], **_ADAM, "beta1": [0.8, 0.9, 0.95, 0.98], **_SHARED},
    "adam_mini": {"lr": [0.004, 0.008, 0.016, 0.032], **_ADAM, **_SHARED},
    "mars": {
        "lr": [0.004, 0.008, 0.016, 0.032],
        "beta1": [0.8, 0.9, 0.95, 0.98],
        "beta2": [0.9, 0.95, 0.98, 0.99],
        "gamma": [0.0125, 0.025, 0.05, 0.1],
        **_SHARED,
        "eps": [1e-30, 1e-25, 1e-20, 1e-15, 1e-10],
    },
    "lion": {
        "lr": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "beta1": [0.8, 0.9, 0.95, 0.98],
        "beta2": [0.9, 0.95, 0.98],
        **{key: _SHARED[key] for key in ("batch_size", "warmup", "clip_grad")},
        "weight_decay": [round(0.1 * i, 1) for i in range(11)],
    },
    "muon": {
        "lr": [0.004, 0.008, 0.016, 0.032, 0.064, 0.128],
        "scalar_lr_ratio": [0.1, 0.2, 0.3],
        "decay": [0.2, 0.4, 0.6, 0.8, 1.0],
        "momentum": [0.8, 0.9, 0.95, 0.98],
        "beta1": [0.8, 0.9, 0.95, 0.98],
        "beta2": [0.9, 0.95, 0.98],
        **_NO_WARMUP,
    },
    "scion": {
        "lr": [0.004, 0.008, 0.016, 0.032, 0.064, 0.128],
        "scalar_lr_ratio": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "decay": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
        "momentum": [0.8, 0.9, 0.95, 0.98],
        "beta1": [0.8, 0.9, 0.95, 0.98],
        **{k: g for k, g in _NO_WARMUP.items() if k != "eps"},
    },
    "soap": {
        "lr": [0.004, 0.008, 0.016],
        "beta1": [0.8, 0.9, 0.95],
        "beta2": [0.9, 0.95, 0.98, 0.99],
        "shampoo_beta": [0.9, 0.95, 0.98, 0.99],
        "block_size": [128, 256, 512],
        "precondition_frequency": [1, 5, 10],
        "floor": [0.0],  # the paper's rule
        **_SHARED,
        "warmup": [500, 1000, 2000],
    },
    "kron": {
        "lr": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "beta1": [0.9, 0.95, 0.98],
        "preconditioner_lr": [0.1, 0.2],
        "update_probability": [0.05, 0.1],
        "update_flat_start": [500, 1000, 2000],
        "block_size": [128, 256, 512],
        "weight_decay": [0.0, 0.5, 0.7, 0.9],
        **{key: _SHARED[key] for key in ("batch_size", "warmup", "clip_grad")},
    },
    "sophia": {
        "lr": [0.002, 0.004, 0.008, 0.016, 0.032],
        "beta1": [0.8, 0.9, 0.95, 0.98],
        "beta2": [0.9, 0.95, 0.98, 0.99, 0.995],
        "gamma": [0.00625, 0.0125, 0.025, 0.05],
        **{key: _SHARED[key] for key in ("batch_size", "warmup")},
        "eps": [1e-17, 1e-12, 1e-7],
        "weight_decay": [0.0, 0.1, 0.2, 0.3],
    },
}
"""search grids of arXiv 2509.02046 (tables of its appendix)"""

PAPER_STARTS: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 0.008, "beta1": 0.9, "beta2": 0.98, "eps": 1e-20, "weight_decay": 0.1, "warmup": 2000},
    "nadamw": {"lr": 0.008, "beta1": 0.95, "beta2": 0.98, "eps": 1e-25, "weight_decay": 0.1, "warmup": 2000},
    "cautious": {
        "lr": 0.008,
        "beta1": 0.95,
        "beta2": 0.98,
        "eps": 1e-15,
        "weight_decay": 0.1,
        "warmup": 2000,
    },
    "adam_mini": {
        "lr": 0.008,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-15,
        "weight_decay": 0.1,
        "warmup": 2000,
    },
    "mars": {
        "lr": 0.016,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-25,
        "gamma": 0.025,
        "weight_decay": 0.1,
        "warmup": 2000,
    },
    "lion": {"lr": 0.002, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.7, "warmup": 2000},
    "muon": {
        "lr": 0.016,
        "scalar_lr_ratio": 0.2,
        "decay": 0.8,
        "momentum": 0.95,
        "beta1": 0.8,
        "beta2": 0.98,
        "eps": 1e-15,
        "weight_decay": 0.1,
    },
    "scion": {
        "lr": 0.016,
        "scalar_lr_ratio": 0.2,
        "decay": 0.8,
        "momentum": 0.95,
        "beta1": 0.95,
        "weight_decay": 0.1,
    },
    "soap": {
        "lr": 0.016,
        "beta1": 0.95,
        "beta2": 0.98,
        "eps": 1e-15,
        "shampoo_beta": 0.95,
        "block_size": 256,
        "precondition_frequency": 1,
        "floor": 0.0,
        "weight_decay": 0.1,
        "warmup": 1000,
    },
    "kron": {
        "lr": 0.002,
        "beta1": 0.95,
        "preconditioner_lr": 0.2,
        "update_probability": 0.05,
        "update_flat_start": 2000,
        "block_size": 256,
        "weight_decay": 0.7,
        "warmup": 1000,
    },
    "sophia": {
        "lr": 0.004,
        "beta1": 0.95,
        "beta2": 0.9,
        "eps": 1e-7,
        "gamma": 0.0125,
        "weight_decay": 0.0,
        "warmup": 4000,
    },
}
"""where the coordinate descent starts: the tuned values of arXiv 2509.02046 at 130M, 1x"""
for _start in PAPER_STARTS.values():
    _start |= {"batch_size": 128, "clip_grad": 1.0}


def flag_of(optimizer: str, hyperparameter: str) -> str:
    """The Megatron flag, without dashes, that sets a hyperparameter of an optimizer."""
    own = OPTIMIZER_FLAGS.get(optimizer, {})
    if hyperparameter in own:
        return own[hyperparameter]
    if hyperparameter in FLAGS:
        return FLAGS[hyperparameter]
    return f"{optimizer}-{hyperparameter}".replace("_", "-")


def schedule_flags(optimizer: str, values: dict[str, Any], length: int, batch: int | None = None) -> dict[str, Any]:
    """Megatron's learning-rate flags of a run of `length` steps; with a `batch`, of so many samples, a step being that many.

    `schedule` cosine | linear | constant | wsd; `warmup` in steps, or as a fraction of the run when below 1;
    `decay` the fraction of the run spent in the linear decay of WSD; `min_lr_ratio` the final lr over lr.
    """
    schedule = values.get("schedule", "wsd" if optimizer in WSD_OPTIMIZERS else "cosine")
    warmup = values.get("warmup", 0)
    warmup = math.floor(warmup * length) if warmup < 1 else int(warmup) * (batch or 1)
    unit = "samples" if batch else "iters"
    flags: dict[str, Any] = {
        "lr-decay-style": "WSD" if schedule == "wsd" else schedule,
        f"lr-warmup-{unit}": min(warmup, length - 1),
        f"lr-decay-{unit}": length,
        "min-lr": values["lr"] * values.get("min_lr_ratio", 0.0),
    }
    if schedule == "wsd":
        flags[f"lr-wsd-decay-{unit}"] = max(1, round(values.get("decay", 0.8) * length))
        flags["lr-wsd-decay-style"] = "linear"
    return flags
