"""Megatron's assertions and exceptions before the first step, listed from its source: each names a flag of the parser."""

import argparse
import ast
import inspect
from pathlib import Path

import pytest

from megatron_opt import platform

platform.activate()

from megatron.core import model_parallel_config  # noqa: E402
from megatron.core.transformer import transformer_config  # noqa: E402
from megatron.training import argument_utils  # noqa: E402
from megatron.training import arguments as megatron_arguments  # noqa: E402

from megatron_opt.errors import UserError, did_you_mean, explained  # noqa: E402
from megatron_opt.training.flags import sentences  # noqa: E402

FLAGS = sentences.Flags.of(
    megatron_arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions
)
# function -> module; what they check is checked before the first step
FUNCTIONS = {
    "validate_args": megatron_arguments,
    "core_transformer_config_from_args": argument_utils,
    "TransformerConfig": transformer_config,
    "MLATransformerConfig": transformer_config,
    "ModelParallelConfig": model_parallel_config,
}


def checks(name):
    """The checks of one function or class of Megatron's."""
    file = inspect.getsourcefile(FUNCTIONS[name])
    tree = ast.parse(Path(file).read_text())
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
    return [check for check in sentences.checks_of(file) if node.lineno <= check.line <= node.end_lineno]


# conditions on what is no flag: the package's version, or a value that Megatron derives and this job never leaves free
_NO_FLAG: set[str] = set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_check_names_a_flag(name):
    found = checks(name)
    assert len(found) >= {"validate_args": 100, "TransformerConfig": 100}.get(name, 1)
    nameless = [
        f"{check.line}: {check.condition}"
        for check in found
        if not any(map(FLAGS.of_name, check.names)) and check.condition not in _NO_FLAG
    ]
    assert not nameless, "\n".join(nameless)


def failing(source, **values):
    """The error of Megatron-like code, run from a file that counts as Megatron's."""
    names: dict = {}
    exec(compile(source.read_text(), str(source), "exec"), names)
    with pytest.raises((AssertionError, TypeError, ValueError)) as caught:
        names["check"](argparse.Namespace(**values))
    return caught.value


CODE = {
    "assert args.min_lr <= args.lr": "it wants --min-lr <= --lr (--min-lr is 0.1, --lr is 0.01); change one of them.",
    "args.train_iters // args.eval_interval": "--eval-interval is not given, and Megatron needs it here; give it.",
    "assert not args.add_bias_linear, 'no bias'": "no bias (--disable-bias-linear is off); change --disable-bias-linear.",
    "total = args.train_iters + 1\n    assert total == 0": "(--train-iters is 4); change --train-iters.",
    "if args.train_iters > 3:\n        raise ValueError('too long')": "too long (--train-iters is 4); change --train-iters.",
}


@pytest.mark.parametrize("code", CODE)
def test_a_failed_check_is_one_sentence(code, tmp_path):
    source = tmp_path / "megatron" / "checked.py"
    source.parent.mkdir()
    source.write_text(f"def check(args):\n    {code}\n")
    error = failing(source, min_lr=0.1, lr=0.01, train_iters=4, eval_interval=None, add_bias_linear=True)
    assert sentences.sentence(error, FLAGS).endswith(CODE[code])


def test_what_is_told_is_a_user_error():
    def fails():
        raise ValueError("no such thing")

    with pytest.raises(UserError, match=r"^setting up: no such thing \(ValueError in test_sentences.py:\d+\)\.$"):
        sentences.told("setting up", FLAGS, fails)


@pytest.mark.parametrize(("word", "meant"), [("lr-warmup", "lr-warmup-init"), ("--learning-rate", "--lr"), ("adamW", "adamw"),
                                             ("optimiser", "optimizer"), ("xyz", "")])  # fmt: skip
def test_did_you_mean(word, meant):
    known = ["lr-warmup-init", "lr-warmup-fraction", "--lr", "adamw", "optimizer", "muon"]
    assert did_you_mean(word, known) == (f" Did you mean {meant}?" if meant else "")


def test_argparse_complaints_are_sentences():
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adamw", "muon"])
    said = "argument --optimizer: invalid choice: 'muno' (choose from 'adamw', 'muon')"
    assert explained(parser, said) == "--optimizer muno is none of adamw, muon. Did you mean muon?"
    assert (
        explained(parser, "unrecognized arguments: --optimzer muon")
        == "--optimzer is no flag here. Did you mean --optimizer?"
    )
