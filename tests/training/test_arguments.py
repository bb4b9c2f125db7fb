"""Command lines: presets, what wins, and what is refused before Megatron is even asked."""

import argparse
import json
from pathlib import Path

import pytest
import yaml

from megatron_opt import presets
from megatron_opt.errors import UserError
from megatron_opt.optimizers import registry
from megatron_opt.training import arguments

PAPER = Path(__file__).parents[2] / "megatron_opt" / "study" / "paper" / "paper_models.json"


def value(argv, flag):
    """The value that argparse would take: the last."""
    places = [i for i, word in enumerate(argv) if word == f"--{flag}"]
    return argv[places[-1] + 1] if places else None


def test_a_flag_beside_the_preset_wins():
    argv = arguments.expand(["--preset", "demo", "--hidden-size", "96"])
    assert value(argv, "hidden-size") == "96" and argv.count("--hidden-size") == 1
    assert value(argv, "num-layers") == "4"


def test_equals_sign_counts_as_given():
    argv = arguments.expand(["--preset", "demo", "--hidden-size=96"])
    assert "--hidden-size" not in argv and "--hidden-size=96" in argv


def test_samples_take_the_place_of_iterations():
    argv = arguments.expand(["--preset", "demo", "--train-samples", "100"])
    assert "--train-iters" not in argv


def test_base_presets_are_expanded():
    assert "--swiglu" in arguments.expand(["--preset", "llama-130m"])


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match=r"no preset 'tiny'.*llama-130m"):
        arguments.expand(["--preset", "tiny"])


@pytest.mark.parametrize("name", presets.names())
def test_presets_hold_flags_only(name):
    flags = yaml.safe_load((presets.FOLDER / f"{name}.yaml").read_text())
    assert all("_" not in key and isinstance(v, (str, int, float, bool, list)) for key, v in flags.items())


@pytest.mark.parametrize("size", ["130m", "300m", "520m", "1.2b"])
def test_study_presets_are_the_papers_models(size):
    model = json.loads(PAPER.read_text())["models"][size]
    flags = presets.read(f"llama-{size}")
    keys = {"layers": "num-layers", "hidden": "hidden-size", "intermediate": "ffn-hidden-size",
            "heads": "num-attention-heads"}  # fmt: skip
    assert {key: flags[flag] for key, flag in keys.items()} == {key: model[key] for key in keys}
    h, f, layers = flags["hidden-size"], flags["ffn-hidden-size"], flags["num-layers"]
    assert layers * (3 * h * f + 4 * h * h) == model["nonembed_params"]
    assert flags["seq-length"] == 4096 and flags["untie-embeddings-and-output-weights"]


def test_optimizer_flags_exist_for_every_field():
    import argparse
    import dataclasses

    from megatron_opt.optimizers import registry
    from megatron_opt.training.optimizer_flags import add_optimizer_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--optimizer", choices=["adam"])
    parser.add_argument("--muon-momentum", type=float, default=0.9)  # Megatron's own gives way
    add_optimizer_arguments(parser)
    for name, optimizer in registry.optimizers().items():
        parsed = parser.parse_args(["--optimizer", name])
        assert parsed.optimizer == name
        for field in dataclasses.fields(optimizer.Config):
            assert getattr(parsed, f"rule_{name}_{field.name}") is None
            assert field.metadata.get("help"), f"{name}.{field.name} has no help"
    assert parser.parse_args(["--muon-momentum", "0.8"]).rule_muon_momentum == 0.8
    assert parser.parse_args(["--muon-nesterov"]).rule_muon_nesterov is True
    assert parser.parse_args(["--muon-nesterov", "false"]).rule_muon_nesterov is False


def _help(flag, capsys):
    from megatron_opt import platform

    platform.activate()
    with pytest.raises(SystemExit) as left:
        arguments.parse([flag])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_is_a_page_and_points_to_the_rest(capsys):
    text = _help("--help", capsys)
    assert text.count("\n") < 150
    for word in ("--preset", "--train-data-path", "--matrix-mode", "megatron-opt optimizers", "--help-all"):
        assert word in text
    assert "--soap-precondition-frequency" not in text


def test_help_all_is_printed_whole(capsys):
    """A lone percent sign in a help text of Megatron's would end it in a traceback."""
    text = _help("--help-all", capsys)
    assert "--soap-precondition-frequency" in text and "--use-mup" in text and "--preset" in text


def test_every_flag_of_ours_is_documented():
    """Flags of single rules: tests/optimizers/test_docs.py."""
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    docs = "".join(path.read_text() for path in (Path(__file__).parents[2] / "docs").glob("*.md"))
    of_rules = tuple(f"--{name.replace('_', '-')}-" for name in registry.optimizers())
    for action in parser._actions:
        if action.dest != "help" and not action.option_strings[0].startswith(of_rules):
            assert any(f"`{flag}" in docs for flag in action.option_strings), action.option_strings
            assert action.help
