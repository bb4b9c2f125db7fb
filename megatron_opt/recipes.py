"""`--recipe NAME`: the optimizer's settings of a published run as flags; works without torch and Megatron."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import yaml

from megatron_opt.errors import UserError, did_you_mean
from megatron_opt.study.hyperparameters import PAPER_STARTS, flag_of

_FILE = resources.files("megatron_opt") / "recipes.yaml"
_OF_THE_RUN = ("lr", "batch_size", "warmup", "decay")  # of a study's values: not an optimizer's alone
_ADAM = (
    "adam-beta1",
    "adam-beta2",
    "adam-eps",
)  # Megatron's flags, which speak to the rule of the scalars where there is one
_SCALARS = {"muon": "adamw", "scion": "signum"}


class Recipe(NamedTuple):
    """Flags (hyphens in their names), where they are from, and what of that run they leave out."""

    flags: dict[str, Any]
    source: str
    without: str
    adam: str = "adamw"  # whom Megatron's --adam-… speak to


def names() -> list[str]:
    """Names that `--recipe` takes."""
    return sorted([*_table(), "study"])


def _table() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(_FILE.read_text(encoding="utf-8")))


def read(name: str, optimizer: str | None = None) -> Recipe:
    """A recipe; `study`'s is that of `optimizer`. UserError for an unknown name, or an optimizer that the study has not tuned."""
    if name == "study":
        return _of_the_study(optimizer)
    table = _table()
    if name not in table:
        known = names()
        raise UserError(
            f"there is no recipe {name!r}; there are {', '.join(known)} (--recipe NAME).{did_you_mean(name, known)}"
        )
    entry = table[name]
    base = read(entry["base"]).flags if "base" in entry else {}
    return Recipe(base | entry.get("flags", {}), entry["source"], entry["without"])


def _of_the_study(optimizer: str | None) -> Recipe:
    if optimizer is None or optimizer not in PAPER_STARTS:
        raise UserError(
            f"--recipe study has the tuned values of {', '.join(PAPER_STARTS)}; choose one of them by --optimizer."
        )
    values = {key: value for key, value in PAPER_STARTS[optimizer].items() if key not in _OF_THE_RUN}
    adam = _SCALARS.get(optimizer, optimizer).replace("_", "-")
    flags = {
        "scalar-lr-ratio" if key == "scalar_lr_ratio" else _own(flag_of(optimizer, key), adam): value
        for key, value in values.items()
    }
    without = "its learning rate, warmup, schedule and batch"
    return Recipe({"optimizer": optimizer} | flags, "arXiv 2509.02046, 130M at 1x", without, adam)


def _own(flag: str, adam: str) -> str:
    """The rule's own flag for one of Megatron's --adam-…"""
    return f"{adam}{flag.removeprefix('adam')}" if flag in _ADAM else flag


def _given(argv: Sequence[str]) -> dict[str, str]:
    """Flags of a command line and their first values; a flag alone is `true`."""
    given: dict[str, str] = {}
    for index, word in enumerate(argv):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            given[name] = value if sign else "true" if following.startswith("--") else following
    return given


def _meaning(flag: str, recipe: Recipe) -> str:
    """The recipe's word for what a flag sets: ratios have one for each optimizer, Adam's options one of Megatron's."""
    if flag.endswith("-scalar-lr-ratio"):
        return "scalar-lr-ratio"
    return _own(flag, recipe.adam)


def _same(said: str, wanted: Any) -> bool:
    try:
        return float(said) == float(wanted)
    except ValueError:
        return said.lower() == str(wanted).lower()


def of_flags(name: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe beside these flags; UserError where one of them says something else."""
    recipe = read(name, given.get("optimizer"))
    if given.get("optimizer-groups"):
        raise UserError(f"--optimizer-groups would replace the groups of --recipe {name}; leave one out.")
    for flag, said in given.items():
        wanted = recipe.flags.get(_meaning(flag, recipe))
        if wanted is not None and not _same(str(said), wanted):
            raise UserError(f"--{flag} {said} contradicts --recipe {name}, which sets {wanted}; leave one of them out.")
    return recipe


def of_command_line(argv: Sequence[str]) -> tuple[str, Recipe] | None:
    """The recipe that a command line names; UserError where another of its flags says something else."""
    given = _given(argv)
    if "recipe" not in given:
        return None
    name = "" if given["recipe"] == "true" else given["recipe"]
    return name, of_flags(name, given)


def shown(name: str, recipe: Recipe) -> str:
    """What a recipe sets, for the log."""
    flags = " ".join(f"--{key}" if value is True else f"--{key} {value}" for key, value in recipe.flags.items())
    return f"recipe {name} ({recipe.source}) sets {flags}; it leaves out {recipe.without}."
