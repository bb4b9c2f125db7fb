"""docs/optimizers.md names every rule, and every flag with its default."""

import dataclasses
from pathlib import Path

import pytest

from megatron_opt.optimizers import registry

DOC = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
WORDS = {True: "true", False: "false", (): "none"}


def shown(value):
    return WORDS[value] if isinstance(value, bool | tuple) else f"{value:g}" if isinstance(value, float) else value


@pytest.mark.parametrize("name", sorted(registry.optimizers()))
def test_every_flag_is_documented_with_its_default(name):
    assert f"`{name}`" in DOC
    if name.endswith("_h"):
        return
    for item in dataclasses.fields(registry.optimizers()[name].Config):
        flag = f"--{name}-{item.name}".replace("_", "-")
        assert f"`{flag} {shown(item.default)}`" in DOC
        assert item.metadata["help"], flag
