"""Every flag and every field of Megatron's model is compared with a checkpoint's, or known to be free."""

import argparse
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_opt.checkpointing import compared
from megatron_opt.errors import UserError

FREE = {
    kind: names.split()
    for kind, names in yaml.safe_load((Path(__file__).parent / "free_flags.yaml").read_text()).items()
}
OURS = {"decay_mode", "ema_decay", "split_heads", "scalar_lr_ratio", "train_epochs", "z_loss_coeff"}


@pytest.fixture(scope="module")
def flags() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_opt.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    theirs = (
        group for group in parser._action_groups if not str(group.title).startswith(("megatron_opt", "optimizer"))
    )
    return {action.dest for group in theirs for action in group._group_actions} - {"help", "help_all"}


def test_every_flag_of_megatrons_parser_has_one_class(flags: set[str]) -> None:
    lists = [compared.FUNCTION, compared.RUN, compared.OPTIMIZER, FREE["layout"], FREE["free"]]
    names = [name for one in lists for name in one]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert sorted(flags - set(names)) == [], "new flags: compared, layout or free?"
    assert sorted(set(names) - flags - OURS) == [], "no flags of this Megatron"


def test_every_field_of_the_models_config_has_one_class(flags: set[str]) -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    fields = {field.name for kind in (TransformerConfig, MLATransformerConfig) for field in dataclasses.fields(kind)}
    assert sorted(fields - flags - set(FREE["config"])) == [], "new fields: made of which flags?"
    assert sorted(set(FREE["config"]) - fields) == []


def _args(**more: object) -> SimpleNamespace:
    same = {"layernorm_epsilon": 1e-5, "seed": 1, "adam_beta2": 0.99, "finetune": False, "no_load_optim": False}
    return SimpleNamespace(**{**same, "train_data_path": ["1", "/old/place/text"], "accept_changed": [], **more})


def test_what_differs_is_named_with_both_values_and_what_accepts_it() -> None:
    with pytest.raises(UserError) as caught:
        compared.check(Path("ck"), _args(), _args(layernorm_epsilon=0.1, seed=5))
    text = str(caught.value)
    assert "its --norm-epsilon is 1e-05, this run's is 0.1" in text and "its --seed is 1, this run's is 5" in text
    assert "--accept-changed norm-epsilon seed" in text
    for names in (["norm-epsilon", "seed"], ["layernorm_epsilon", "seed"]):
        compared.check(Path("ck"), _args(), _args(layernorm_epsilon=0.1, seed=5, accept_changed=names))
    with pytest.raises(UserError, match="--seed is 1"):
        compared.check(Path("ck"), _args(), _args(layernorm_epsilon=0.1, seed=5, accept_changed=["norm-epsilon"]))


def test_finetuning_compares_the_function_alone() -> None:
    compared.check(Path("ck"), _args(), _args(seed=5, adam_beta2=0.9, finetune=True))
    with pytest.raises(UserError, match="norm-epsilon"):
        compared.check(Path("ck"), _args(), _args(layernorm_epsilon=0.1, finetune=True))
    compared.check(Path("ck"), _args(), _args(adam_beta2=0.9, no_load_optim=True))
    with pytest.raises(UserError, match=r"--adam-beta2 is 0\.99"):
        compared.check(Path("ck"), _args(), _args(adam_beta2=0.9))


def test_data_may_have_moved_but_not_become_other_data() -> None:
    compared.check(Path("ck"), _args(), _args(train_data_path=["1", "/new/text"]))
    with pytest.raises(UserError, match="--train-data-path"):
        compared.check(Path("ck"), _args(), _args(train_data_path=["1", "/new/other"]))


def test_words_that_name_no_compared_flag_are_refused() -> None:
    compared.check_accepted(["norm-epsilon", "layernorm_epsilon"])
    with pytest.raises(UserError, match="--accept-changed log-interval"):
        compared.check_accepted(["log-interval"])


def test_a_value_that_the_checkpoint_does_not_record_is_not_compared() -> None:
    old = _args()
    del old.seed
    compared.check(Path("ck"), old, _args(seed=7))
