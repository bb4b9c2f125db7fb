"""What our optimizers do not do with Megatron is refused at start, naming the flag and what to do."""

import re
from argparse import Namespace
from typing import Any

import pytest

from megatron_opt.errors import UserError
from megatron_opt.training.flags.refused import BY_OPTIMIZER, WITHOUT_MEANING
from megatron_opt.training.optimizer_flags import check_optimizer_arguments


def flags(**given: Any) -> Namespace:
    plain = {"optimizer": "muon", "optimizer_groups": None, "scalar_lr_ratio": None, "given_flags": set()}
    return Namespace(**{**plain, "matrix_mode": "auto", "matrix_balance": 1.1, **given})


@pytest.mark.parametrize("name", [flag.replace("-", "_") for flag in BY_OPTIMIZER])
def test_unsupported_flag_is_refused(name: str) -> None:
    fine, _ = BY_OPTIMIZER[name.replace("_", "-")]
    wrong = "torch" if name == "ckpt_format" else 2 if fine else True
    with pytest.raises(
        UserError, match=re.escape(f"--{name.replace('_', '-')} does not work with --optimizer muon")
    ) as said:
        check_optimizer_arguments(flags(**{name: wrong}))
    assert str(said.value).count(". ") <= 1
    for value in fine:
        check_optimizer_arguments(flags(**{name: value}))
    check_optimizer_arguments(flags(**{name: wrong, "optimizer": "adam"}))


@pytest.mark.parametrize("name", WITHOUT_MEANING)
def test_flag_without_meaning_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} has no meaning"):
        check_optimizer_arguments(flags(given_flags={name}))


@pytest.mark.parametrize("value", [0.9, -1.0, float("nan"), float("inf")])
def test_a_balance_that_no_plan_can_keep_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"--matrix-balance .* give 1 or more"):
        check_optimizer_arguments(flags(matrix_balance=value))


def test_a_balance_without_effect_is_refused() -> None:
    given = {"matrix_balance": 1.5, "given_flags": {"matrix-balance"}}
    check_optimizer_arguments(flags(**given))
    with pytest.raises(UserError, match="--matrix-balance has no effect without --matrix-mode auto"):
        check_optimizer_arguments(flags(**given, matrix_mode="owner"))
