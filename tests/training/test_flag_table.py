"""Every flag of Megatron's parser is read on our path, changes no number, or is refused; a new one fails here by name."""

import argparse
import dataclasses
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from megatron_opt import platform

platform.activate()

import megatron.core  # noqa: E402
import megatron.training  # noqa: E402
from megatron.core.transformer import MLATransformerConfig  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

from megatron_opt.errors import UserError  # noqa: E402
from megatron_opt.optimizers import registry  # noqa: E402
from megatron_opt.training import arguments  # noqa: E402
from megatron_opt.training.flags import ranges, table  # noqa: E402

ACTIONS = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions
REFUSALS = {"refused", "needs a GPU", "needs Transformer Engine", "by optimizer", "of Megatron's optimizers"}


def test_every_flag_of_megatrons_is_classified_once():
    unknown = [table.names_of(action)[0] for action in ACTIONS if not table.kinds_of(action)]
    assert not unknown, f"say in megatron_opt/training/flags what becomes of {unknown}"
    for action in ACTIONS:
        kinds = table.kinds_of(action)
        if kinds & {"supported", "free"}:
            assert len(kinds) == 1 or kinds == {"supported", "by optimizer"}, (table.names_of(action), kinds)


def test_no_line_of_the_tables_is_left_over():
    known = [name for action in ACTIONS for name in table.names_of(action)]
    derived = {"use-layer-wise-distributed-optimizer"}  # set by Megatron from other flags
    for kind, names in table.patterns().items():
        left = [name for name in names if name not in derived and not any(fnmatchcase(k, name) for k in known)]
        assert not left, f"{kind}: Megatron has no {left}"


def test_a_new_flag_fails_by_its_name():
    action = argparse.ArgumentParser().add_argument("--moe-levitate", action="store_true")
    assert not table.kinds_of(action)


@pytest.fixture(scope="module")
def read():
    """Names that code on our path takes from an object: `x.name`, "name"; Megatron's definitions of flags left out."""
    off = re.compile(
        r"/(inference|rl|export|post_training|bert|T5|t5|retro|vision|multimodal|mimo)/"
        r"|training/(arguments|yaml_arguments)\.py|training/config/|flags/(supported|refused)\.py"
    )
    found: set[str] = set()
    for package in (megatron.core, megatron.training, __import__("megatron_opt")):
        for file in Path(next(iter(package.__path__))).rglob("*.py"):
            if not off.search(str(file)):
                text = file.read_text(errors="ignore")
                found |= set(re.findall(r"(?:\.|[\"'])([A-Za-z_]\w*)", text))
    return found


# ours in the place of Megatron's: dest is another one
_OURS = {
    f"{name}-{field}".replace("_", "-")
    for name, optimizer in registry.optimizers().items()
    for field in optimizer.Config.__dataclass_fields__
}
# dests that only validate_args reads, to set what others read
_BY_VALIDATION = {"recompute_activations", "use_rotary_position_embeddings", "num_virtual_stages_per_pipeline_rank",
                  "num_layers_per_virtual_pipeline_stage", "grad_reduce_in_bf16", "step_batch_size_schedule",
                  "data_cache_path", "account_for_embedding_in_pipeline_split"}  # fmt: skip


def test_supported_flags_have_a_reader(read):
    unread = [
        table.names_of(action)[0]
        for action in ACTIONS
        if "supported" in table.kinds_of(action)
        and action.dest not in read | _BY_VALIDATION
        and not _OURS & set(table.names_of(action))
    ]
    assert not unread


_OFF_PATH = re.compile(r"^(inference|export|post_training|tokenizers|models/(bert|T5|vision|multimodal|mimo|audio))/")
_ENGINE = re.compile(r"^extensions/|^fp[48]_utils\.py$")  # what only Transformer Engine's layers come to
_DEFINED = {"transformer/transformer_config.py", "model_parallel_config.py"}
# fields that no flag is named like: the flags that set them; none where Megatron's command line cannot
_SET_BY = {
    "disable_parameter_transpose_cache": (), "fp8_dot_product_attention": (), "fp8_multi_head_attention": (),
    "tp_comm_overlap_disable_fc1": (),
    "tp_comm_overlap_disable_qkv": (), "tp_comm_atomic_ag": (), "tp_comm_atomic_rs": (),
    "tp_only_amax_red": (), "fp8_param": ("fp8-param-gather",),
    "fp4_param": ("fp4-param-gather",), "tp_comm_split_ag": ("no-tp-comm-split-ag",),
}  # fmt: skip
_OURS_TOO = {
    "log_max_attention_logit"
}  # the attention in place of the local layers' reads it (platform/attention_logits.py)


def _fields_of_the_engine():
    """Fields of the configuration that, on our path, Transformer Engine's layers alone read."""
    root = Path(next(iter(megatron.core.__path__)))
    names = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    places = {name: set() for name in names}
    for file in root.rglob("*.py"):
        relative = str(file.relative_to(root))
        if relative in _DEFINED or _OFF_PATH.search(relative):
            continue
        for name in names.intersection(re.findall(r"(?:\.|[\"'])([A-Za-z_]\w*)", file.read_text(errors="ignore"))):
            places[name].add(relative)
    return sorted(name for name, files in places.items() if files and all(map(_ENGINE.search, files)))


def test_what_only_transformer_engines_layers_read_is_refused_on_local_ones():
    """By the flag's name; a field that a new Megatron reads there fails here."""
    fields = _fields_of_the_engine()
    assert {"fp8_interval", "fused_residual_rmsnorm", "tp_comm_overlap_ag", "fp8_wgrad", "tp_comm_overlap"} <= set(
        fields
    )
    loose = []
    for name in fields:
        flags = [a for a in ACTIONS if a.dest == name or set(table.names_of(a)) & set(_SET_BY.get(name, ()))]
        if not flags and name not in _SET_BY:
            loose.append(f"{name}: no flag of that name; say in _SET_BY what sets it")
        for action in flags:
            if name not in _OURS_TOO and not table.kinds_of(action) & {
                "needs Transformer Engine", "refused", "by optimizer",
            }:  # fmt: skip
                loose.append(f"--{table.names_of(action)[0]} ({name}) must stand in NEEDS_TE")
    assert not loose


@pytest.mark.parametrize("flags", ["--fp8-interval 2", "--fused-residual-rmsnorm", "--tp-comm-overlap",
                                   "--no-tp-comm-overlap-ag", "--cp-comm-type a2a", "--flash-attention-version 3"])  # fmt: skip
def test_a_local_layer_with_a_flag_of_the_engines_is_refused(flags):
    words = flags.split()
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    given = {word.removeprefix("--") for word in words if word.startswith("--")}
    args = parser.parse_args([*words, "--transformer-impl", "local"])
    with pytest.raises(UserError, match=f"^{words[0]}.* has no effect on local layers"):
        table.check_flags(args, parser._actions, given, cpu=False, engine=True, ours=True)
    args.transformer_impl = "transformer_engine"
    table.check_flags(args, parser._actions, given, cpu=False, engine=True, ours=True)


def test_every_number_on_our_path_has_a_range():
    """Flags of rules have theirs in the rule's options; refused ones have none."""
    parser = arguments.add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    without = [
        table.names_of(action)[0]
        for action in parser._actions
        if action.type in (int, float)
        and not action.dest.startswith("rule_")
        and not table.kinds_of(action) & {"refused", "by optimizer", "of Megatron's optimizers"}
        and not set(table.names_of(action)) & (ranges.RANGES.keys() | ranges.NO_RANGE.keys())
    ]
    assert not without, f"give a range, or a reason for none, in megatron_opt/training/flags/ranges.py: {without}"
    known = {name for action in parser._actions for name in table.names_of(action)}
    assert not (ranges.RANGES.keys() | ranges.NO_RANGE.keys()) - known


def test_defaults_are_in_their_ranges():
    held = 0
    for action in ACTIONS:
        for name in table.names_of(action):
            if name in ranges.RANGES and action.default not in (None, []):
                assert ranges.RANGES[name].holds(action.default), name
                held += 1
    assert held > 80
