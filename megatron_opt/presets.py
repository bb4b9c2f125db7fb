"""The one reader of `presets/NAME.yaml`: a model's and a run's flags by name; works without torch and Megatron."""

from importlib import resources
from typing import Any

import yaml

from megatron_opt.errors import UserError, did_you_mean

FOLDER = resources.files("megatron_opt") / "presets"


def names() -> list[str]:
    """Names of the files in `presets/`."""
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))


def read(name: str) -> dict[str, Any]:
    """A preset's flags, hyphens in their names; `base: OTHER` in it takes the other's first; raises UserError."""
    known = names()
    if name not in known:
        guess = did_you_mean(name, known)
        raise UserError(f"there is no preset {name!r}; there are {', '.join(known)} (--preset NAME).{guess}")
    flags = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    base = flags.pop("base", None)
    return (read(base) if base else {}) | flags
