"""µP's flags, its effect on a real model over width, and the command that shows it."""

import json
import math
from argparse import Namespace

import pytest

from megatron_opt import cli
from megatron_opt.errors import UserError
from megatron_opt.optimizers.base import MatrixInfo
from megatron_opt.training import mup_check
from megatron_opt.training.initialization import scale_of
from megatron_opt.training.optimizer_flags import check_optimizer_arguments
from megatron_opt.training.width import check_mup, width_ratio

WIDTHS = [32, 64, 128]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mup")
    flags = [
        "--",
        "--optimizer",
        "adamw",
        "--lr",
        "0.01",
        "--num-layers",
        "1",
        "--seq-length",
        "32",
        "--vocab-size",
        "127",
    ]
    flags += ["--mock-data", "--tokenizer-type", "NullTokenizer"]
    code = cli.main(
        ["mup", "check", "--widths", *map(str, WIDTHS), "--steps", "4", "--output-dir", str(folder), *flags]
    )
    assert code == 0
    return folder


HIDDEN = ("qkv", "attention", "attention output", "mlp up", "mlp down", "residual")


def test_activations_follow_the_width_without_mup_alone(checked):
    """Adam's step of lr on each of n inputs moves an output by lr·n without µP, by lr·base with it."""
    summary = json.loads((checked / "mup_check.json").read_text())["summary"]
    for measure in ("sizes", "changes"):
        for name in (*HIDDEN, "logits"):
            flat, steep = (summary[kind][measure][name]["slope"] for kind in ("mup", "standard"))
            # logits of random text: the part of their steps that no gradient aligns falls by r^(−1/2), never grows
            assert abs(flat) < 0.35 or (name == "logits" and -0.6 < flat < 0), (measure, name)
            assert steep > 0.4 and steep > flat + 0.4, (measure, name)


def test_training_does_not_follow_the_width_under_mup(checked):
    steps = json.loads((checked / "mup_check.json").read_text())["steps"]
    losses = {kind: [steps[f"{kind} {width}"]["losses"][-1] for width in WIDTHS] for kind in ("mup", "standard")}
    assert max(losses["mup"]) < 1.03 * min(losses["mup"])
    assert max(losses["standard"]) > 1.5 * min(losses["standard"])


def test_the_check_leaves_table_and_picture(checked):
    assert (checked / "mup_check.png").read_bytes()[:4] == b"\x89PNG"
    text = (checked / "mup_check.txt").read_text()
    assert "mup, mean |x| after the last step" in text and all(name in text for name in HIDDEN)


def test_slope_is_the_power_of_the_width():
    assert mup_check.slope([2, 8, 32], [3.0, 3.0 * 2, 3.0 * 4]) == pytest.approx(0.5)
    assert mup_check.slope([2, 4], [1.0, float("nan")]) == math.inf


@pytest.mark.parametrize(
    "options, flags, words",
    [
        ({"widths": [32, 40]}, [], "width 40 is not a multiple"),
        ({"widths": [32]}, [], "at least two"),
        ({}, ["--hidden-size", "64"], "--hidden-size is set by the check"),
    ],
)
def test_command_lines_that_make_no_sense_are_refused(options, flags, words):
    given = {"widths": [32, 64], "head_dim": 16, "ffn_ratio": 3.0, "steps": 2, "base_width": None, **options}
    with pytest.raises(UserError, match=words):
        mup_check.command_lines(Namespace(**given), flags)


def arguments(given=(), **values):
    known = {"use_mup": True, "mup_base_hidden_size": 32, "optimizer": "adamw", "optimizer_groups": None,
             "scalar_lr_ratio": None, "matrix_mode": "auto", "matrix_balance": 1.1}  # fmt: skip
    return Namespace(**{**known, "given_flags": set(given), **values})


@pytest.mark.parametrize(
    "args, words",
    [
        (arguments(use_mup=False, given=["mup-base-hidden-size"]), "no effect without --use-mup"),
        (arguments(mup_base_hidden_size=None), "needs --mup-base-hidden-size"),
        (arguments(mup_base_hidden_size=0), "is not a width"),
        (arguments(given=["mup-width-mult"]), "--hidden-size over --mup-base-hidden-size"),
        (arguments(multi_latent_attention=True), "multi-latent-attention"),
    ],
)
def test_mup_flags_without_meaning_are_refused(args, words):
    with pytest.raises(UserError, match=words):
        check_mup(args)
    with pytest.raises(UserError, match=words):
        check_optimizer_arguments(args)
    check_optimizer_arguments(arguments())


@pytest.mark.parametrize("style, hidden, embedding, output", [
    ("megatron", 0.02 / 2, 0.02, 0.02),
    ("study", 256**-0.5, 1 / 64, 64**-0.5),
])  # fmt: skip
def test_initial_scales_follow_the_width_from_the_base(style, hidden, embedding, output):
    config = Namespace(use_mup=True, mup_width_mult=4.0, init_method_std=0.02, num_layers=2)
    assert width_ratio(config) == 4.0 and width_ratio(Namespace(use_mup=False, mup_width_mult=4.0)) == 1.0
    for kind, shape, expected in (
        ("hidden", (256, 256), hidden), ("embedding", (512, 256), embedding), ("output", (512, 256), output),
        ("router", (8, 256), hidden),
    ):  # fmt: skip
        assert scale_of(MatrixInfo("w", shape, kind), style, config) == pytest.approx(expected)
