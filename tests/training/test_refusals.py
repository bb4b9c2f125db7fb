"""What our optimizers do not do with Megatron is refused at start, naming the flag and what to do."""

import re
from argparse import Namespace
from typing import Any

import pytest

from megatron_opt.errors import UserError
from megatron_opt.training.optimizer_flags import _REFUSED, _UNSUPPORTED, check_optimizer_arguments


def flags(**given: Any) -> Namespace:
    return Namespace(**{"optimizer": "muon", "optimizer_groups": None, "scalar_lr_ratio": None, "given_flags": set(), **given})


@pytest.mark.parametrize("name", _UNSUPPORTED)
def test_unsupported_flag_is_refused(name: str) -> None:
    fine, _ = _UNSUPPORTED[name]
    wrong = "torch" if name == "ckpt_format" else 2 if fine else True
    with pytest.raises(UserError, match=re.escape(f"--{name.replace('_', '-')} does not work with --optimizer muon")) as said:
        check_optimizer_arguments(flags(**{name: wrong}))
    assert str(said.value).count(". ") <= 1
    for value in fine:
        check_optimizer_arguments(flags(**{name: value}))
    check_optimizer_arguments(flags(**{name: wrong, "optimizer": "adam"}))


@pytest.mark.parametrize("name", _REFUSED)
def test_flag_without_meaning_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} has no meaning"):
        check_optimizer_arguments(flags(given_flags={name}))


def test_every_unsupported_flag_is_one_of_megatrons() -> None:
    from megatron_opt import platform

    platform.activate()
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    known = {action.dest for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions}
    derived = {"use_layer_wise_distributed_optimizer"}  # set by Megatron from other flags
    assert set(_UNSUPPORTED) - derived <= known
