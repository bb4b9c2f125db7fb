"""Defaults are the study's tuned values, and no option takes a value without a meaning."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest

import megatron_opt
from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.groups import default_group_configs

TUNED = json.loads((Path(megatron_opt.__file__).parent / "study" / "paper" / "paper_hparams.json").read_text())
ADAM = {"beta1": "beta1", "beta2": "beta2", "eps": "eps"}
# rule: the data's name of each hyperparameter -> the field
FIELDS = {
    "adamw": ADAM,
    "nadamw": ADAM,
    "mars": ADAM | {"gamma": "gamma", "max_grad_norm": "max_grad_norm"},
    "cautious": ADAM,
    "lion": {"beta1": "beta1", "beta2": "beta2"},
    "adam_mini": ADAM,
    "muon": {"momentum": "momentum", "muon_eps": "eps"},
    "scion": {"momentum": "momentum", "scion_eps": "eps"},
    "soap": ADAM | {"block": "block_size", "freq": "precondition_frequency", "shampoo_beta": "shampoo_beta"},
    "kron": {"beta1": "beta1", "block": "block_size", "normgrad": "normalize_grads", "lr_pc": "preconditioner_lr",
             "init_pc": "preconditioner_init_scale", "p_pc": "update_probability", "flat_start": "update_flat_start"},
    "sophia": ADAM | {"gamma": "gamma"},
}  # fmt: skip


def most_frequent(optimizer: str, key: str) -> set:
    """The values that are the tuned one in most of the study's regimes."""
    cells = [cell["hparams"] for size in TUNED[optimizer].values() for cell in size.values()]
    counts = Counter(cell[key] for cell in cells if key in cell)
    return {value for value, count in counts.items() if count == max(counts.values())}


@pytest.mark.parametrize("optimizer, key", [(optimizer, key) for optimizer, keys in FIELDS.items() for key in keys])
def test_default_is_the_most_frequent_tuned_value(optimizer, key):
    config = registry.build(optimizer, {}).config
    assert getattr(config, FIELDS[optimizer][key]) in most_frequent(optimizer, key)


@pytest.mark.parametrize("optimizer", ["muon", "scion"])
def test_the_scalars_group_has_its_tuned_values(optimizer):
    scalars = default_group_configs(optimizer)[-1]
    for key, value in scalars.options.items():
        assert value in most_frequent(optimizer, key), key
    name = {"muon": "adam_lr", "scion": "signum_lr"}[optimizer]
    cells = [cell["hparams"] for size in TUNED[optimizer].values() for cell in size.values()]
    ratios = Counter(round(cell[name] / cell["lr"], 3) for cell in cells)
    assert ratios[scalars.lr_scale] == max(ratios.values())


EVERY = [(name, item) for name, cls in sorted(registry.optimizers().items()) for item in dataclasses.fields(cls.Config)]


def _is_number(item):
    return isinstance(item.default, int | float) and not isinstance(item.default, bool)


@pytest.mark.parametrize("name, item", EVERY, ids=[f"{name}-{item.name}" for name, item in EVERY])
def test_values_without_a_meaning_are_refused(name, item):
    meta, wrong = item.metadata, []
    assert meta["help"]
    if choices := meta.get("choices"):
        assert item.default in choices
        wrong = ["no such word"]
    elif _is_number(item):
        low, above, below, high = (meta[key] for key in ("low", "above", "below", "high"))
        assert (low is None) != (above is None) and (below is None) != (high is None), "a number without limits"
        step = 1 if isinstance(item.default, int) else 0.0
        wrong = [above if low is None else low - step if step else math.nextafter(low, -math.inf)]
        wrong += [below if high is None else high + step if step else math.nextafter(high, math.inf)]
        wrong += [math.nan, math.inf, -math.inf, True, "many", None, [1], *([1.5] if step else [])]
    elif isinstance(item.default, bool):
        wrong = ["maybe", 1, None]
    flag = f"--{name}-{item.name}".replace("_", "-")
    for value in wrong:
        with pytest.raises(UserError, match=f"^{flag} (is|are) "):
            registry.build(name, {item.name: value})


@pytest.mark.parametrize("text", ["3e-1", "0.3", 0.3])
def test_yaml_numbers_that_are_text_are_numbers(text):
    config = registry.build("adamw", {"beta1": text, "rounding_seed": "7"}).config
    assert config.beta1 == 0.3 and config.rounding_seed == 7


@pytest.mark.parametrize("name, item", [each for each in EVERY if each[1].metadata.get("needs")])
def test_options_that_another_one_leaves_without_effect_are_refused(name, item):
    other, value = item.metadata["needs"]
    words = registry.optimizers()[name].Config.__dataclass_fields__[other].metadata.get("choices", (True, False))
    without = next(word for word in words if word != value)
    flag = f"--{name}-{item.name}".replace("_", "-")
    with pytest.raises(UserError, match=f"^{flag} has no effect without --{name}-{other}".replace("_", "-")):
        registry.build(name, {item.name: item.default, other: without})
    registry.build(name, {item.name: item.default, other: value})


def test_unknown_options_and_names_are_refused():
    for name in registry.optimizers():
        with pytest.raises(UserError, match="no option 'nonsense'"):
            registry.build(name, {"nonsense": 1})
    with pytest.raises(UserError, match="there is no optimizer"):
        registry.build("nonsense", {})
