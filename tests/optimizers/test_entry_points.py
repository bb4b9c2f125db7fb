"""A rule of another package is registered by its entry point, and is then like ours."""

import argparse
import sys

import pytest
import torch

from megatron_opt.errors import UserError
from megatron_opt.optimizers import groups, registry
from megatron_opt.optimizers.base import MatrixInfo
from tests.outside import install


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A registry that knows no entry point yet, and a folder of packages."""
    monkeypatch.setattr(registry, "_OPTIMIZERS", dict(registry.optimizers()))
    monkeypatch.syspath_prepend(str(tmp_path))
    for cached in (registry._entries, registry._load):
        cached.cache_clear()
    yield tmp_path
    for cached in (registry._entries, registry._load):
        cached.cache_clear()
    sys.modules.pop("outside_two_averages", None)


def test_a_rule_of_another_package_is_built_grouped_and_has_flags(outside):
    from megatron_opt.training.optimizer_flags import add_optimizer_arguments

    install(outside)
    assert "two_averages" in registry.optimizers() and registry.optimizers() == registry.optimizers()
    infos = [MatrixInfo("layers.0.weight", (6, 4)), MatrixInfo("norm.weight", (4,), "norm")]
    (first, second) = groups.assign(
        infos, groups.default_group_configs("two_averages", {"two_averages": {"alpha": "3"}}), width_ratio=4
    )
    assert (first.optimizer, first.lr_scale, second.lr_scale) == ("two_averages", 0.25, 1.0)
    optimizer = registry.build("two_averages", {"alpha": "3"})
    (u,) = optimizer.update([torch.ones(6, 4)], [optimizer.init_state(torch.zeros(6, 4), infos[0])], 1, infos[:1])
    torch.testing.assert_close(u, torch.full((6, 4), 1 + 3 * 0.001))
    with pytest.raises(UserError, match=r"^--two-averages-beta3 is 1\.0; it must be"):
        registry.build("two_averages", {"beta3": 1})
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam"])
    add_optimizer_arguments(parser)
    args = parser.parse_args(["--optimizer", "two_averages", "--two-averages-alpha", "2"])
    assert args.rule_two_averages_alpha == 2.0


def test_an_entry_point_that_does_not_load_is_named(outside):
    (install(outside) / "outside_two_averages.py").write_text("import nothing_of_the_kind")
    with pytest.raises(UserError, match=r"entry point 'two_averages' .* cannot be loaded: No module named"):
        registry.optimizers()


def test_a_name_of_ours_cannot_be_taken(outside):
    path = install(outside) / "outside_two_averages.py"
    path.write_text(path.read_text().replace('name = "two_averages"', 'name = "soap"'))
    with pytest.raises(UserError, match="'soap' is registered twice"):
        registry.optimizers()
