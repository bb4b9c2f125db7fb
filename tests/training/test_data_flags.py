"""Which datasets the flags name, whatever the flag, and what is refused before a job starts."""

import json
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_opt import platform
from megatron_opt.data.indexed import write_index
from megatron_opt.errors import UserError
from megatron_opt.training import data_flags

platform.activate()


def flags(**given):
    names = (*data_flags._JOINT, *data_flags._PER_SPLIT, *data_flags._PATHS, "split", "tokenizer_model")
    plain = dict.fromkeys(names) | {
        "mock_data": False, "padded_vocab_size": 128, "seq_length": 8, "eval_iters": 0, "whole_validation": False,
        "reset_position_ids": False, "reset_attention_mask": False, "skip_train": False,
        "position_embedding_type": "rope", "transformer_impl": "local", "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "train_samples": 4, "train_iters": None, "global_batch_size": 2,
        "given_flags": set(), "create_attention_mask_in_dataloader": False,
    }  # fmt: skip
    return Namespace(**{**plain, **given})


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes a dataset of documents of these lengths; the working folder is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(prefix, lengths, top=100):
        tokens = np.arange(sum(lengths), dtype=np.int32) % (top + 1)
        (tmp_path / f"{prefix}.bin").write_bytes(tokens.tobytes())
        with (tmp_path / f"{prefix}.idx").open("wb") as stream:
            write_index(stream, np.int32, np.array(lengths, dtype=np.int32))
        return prefix

    return write


def file(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def ways(tmp_path, words):
    """The same list of words by every flag that takes one."""
    yield {"data_path": words, "split": "1,0,0"}
    yield {"data_args_path": file(tmp_path / "words.txt", " ".join(words)), "split": "1,0,0"}
    yield {"train_data_path": words}
    yield {"per_split_data_args_path": file(tmp_path / "list.json", {"train": words, "valid": None, "test": None})}
    yield {"per_split_data_args_path": file(tmp_path / "text.json", {"train": " ".join(words)})}


@pytest.mark.parametrize("words", [["a"], ["a", "2024", "b"], ["1", "a", "2.5", "b"], ["1e-2", "2024"], ["./7", "a"]])
def test_the_same_datasets_as_megatron_reads(tmp_path, make, words):
    from megatron.core.datasets.utils import get_blend_from_list

    make("2024", [9])
    for way in ways(tmp_path, words):
        sources = data_flags.resolve(flags(**way))
        blend = sources.joint or sources.apart[0]
        prefixes, weights = get_blend_from_list(words)
        assert blend.for_megatron() == (list(prefixes), weights)
        assert list(sources.prefixes()) == list(dict.fromkeys(prefixes))


def test_a_dataset_is_checked_whatever_names_it(tmp_path, make):
    make("fits", [20, 20]), make("2024", [200, 200], top=199)
    for words in (["2024"], ["1.0", "2024"], ["1", "fits", "2", "2024"], ["fits", "2024", "fits"]):
        for way in ways(tmp_path, words):
            with pytest.raises(UserError, match="2024 holds the token id 199, the vocabulary has 128"):
                data_flags.check(flags(**way))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "names no dataset"),
        ([" "], "names no dataset"),
        (["0", "a"], "the weight 0 of a must be above 0"),
        (["-1", "a"], "the weight -1 of a must be above 0"),
        (["1", "a", "nan", "b"], "the weight nan of b must be above 0"),
        (["inf", "a"], "the weight inf of a must be above 0"),
        (["1", "a", "b", "c"], "some datasets have a weight and some have none"),
        (["0.5", "a", "0.5"], "0.5 reads as a weight"),
        (["a", "0.5"], "0.5 reads as a weight"),
        (["2024", "a"], "2024 reads as the weight of a, but 2024.idx is there; write ./2024"),
    ],
)
def test_lists_that_cannot_be_meant(tmp_path, make, words, said):
    make("2024", [9])
    for way in ways(tmp_path, words):
        if words != [" "] or "data_args_path" not in way:
            with pytest.raises(UserError, match=f"^--.*{said}"):
                data_flags.resolve(flags(**way))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"train": 3}', '{"train": [["a"]]}', '{"training": ["a"]}', '{"train": []}', "[" * 9999],
)
def test_files_that_cannot_be_meant(tmp_path, content):
    with pytest.raises(UserError, match=r"^--per-split-data-args-path"):
        data_flags.resolve(flags(per_split_data_args_path=file(tmp_path / "f.json", content)))


def test_flags_that_contradict_each_other_or_are_missing(tmp_path):
    for given, said in (
        ({}, "there is no data"),
        (
            {"data_path": ["a"], "train_data_path": ["b"], "split": "1"},
            "--data-path and --train-data-path name the data",
        ),
        ({"data_path": ["a"], "mock_data": True}, "--data-path and --mock-data"),
        ({"train_data_path": ["a"], "split": "1,1,1"}, "--split cuts what --data-path names"),
        ({"data_args_path": "nowhere", "split": "1"}, "--data-args-path nowhere cannot be read"),
        ({"data_args_path": file(tmp_path / "w", "a")}, "--data-args-path needs --split"),
    ):
        with pytest.raises(UserError, match=said):
            data_flags.resolve(flags(**given))


@pytest.mark.parametrize("split", ["95,5", "100", "969, 30, 1", "0.9,.1,0", "8,0,2"])
def test_splits_as_megatron_cuts_them(make, split):
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

    shares = data_flags.resolve(flags(data_path=["a"], split=split)).shares()
    wanted = parse_and_normalize_split(split)
    assert [0.0 if share is None else share[1][1] - share[1][0] for share in shares] == pytest.approx(wanted)


@pytest.mark.parametrize("split", ["", "0,0,0", "-5,100", "1,2,3,4", "a,b", "90;10", "nan,1", "9-1"])
def test_splits_that_cannot_be_meant(split):
    with pytest.raises(UserError, match=r"^--split"):
        data_flags.resolve(flags(data_path=["a"], split=split))


def test_a_split_without_a_token(make):
    make("even", [3] * 60), make("hollow", [30] * 50 + [0] * 10)
    for prefix, split, said in (
        ("even", "9998,1,1", "the valid split gets 0 of the 60 documents of even"),
        ("hollow", "5,0,1", "the test split gets 10 of the 60 documents of hollow and no token"),
    ):
        with pytest.raises(UserError, match=f"--data-path: {said}.*change --split {split}"):
            data_flags.check(flags(data_path=["1", prefix], split=split))
    data_flags.check(flags(data_path=["even"], split="58,1,1"))
    data_flags.check(flags(data_path=["even"], split="60,0,0"))


def test_too_little_where_data_is_read_once(make):
    make("long", [81]), make("short", [8])
    data_flags.check(flags(train_data_path=["long", "long", "long"], train_samples=30))
    with pytest.raises(UserError, match="hold 30 samples and are read once, the run needs 31"):
        data_flags.check(flags(train_data_path=["long", "long", "long"], train_samples=31))
    data_flags.check(flags(train_data_path=["1", "long", "1", "short"], train_samples=99))
    with pytest.raises(UserError, match="8 tokens of short, which are read once and give no whole sample"):
        data_flags.check(flags(train_data_path=["long", "short", "long"]))
    with pytest.raises(UserError, match="read once"):
        data_flags.check(flags(train_data_path=["long"], valid_data_path=["short"], whole_validation=True))


def test_what_is_missing(make):
    make("a", [81])
    with pytest.raises(UserError, match="no training data"):
        data_flags.check(flags(valid_data_path=["a"]))
    quiet = flags(train_data_path=["a"], eval_iters=10)
    data_flags.check(quiet)
    assert quiet.eval_iters == 0
    with pytest.raises(UserError, match="--eval-iters: there is no validation data"):
        data_flags.check(flags(train_data_path=["a"], eval_iters=10, given_flags={"eval-iters"}))


def test_masks_of_documents_reach_the_attention_or_are_refused(make):
    make("a", [81])
    fine = flags(train_data_path=["a"], reset_attention_mask=True)
    data_flags.check(fine)
    assert fine.create_attention_mask_in_dataloader
    for given in (
        {"transformer_impl": "transformer_engine"},
        {"pipeline_model_parallel_size": 4},
        {"given_flags": {"no-create-attention-mask-in-dataloader"}},
    ):
        with pytest.raises(UserError, match="--reset-attention-mask"):
            data_flags.check(flags(train_data_path=["a"], reset_attention_mask=True, **given))


def test_every_data_flag_of_megatron_is_read_or_refused():
    import ast
    import inspect

    from megatron.training import arguments, checkpointing, training
    from megatron.training.datasets import data_samplers

    from megatron_opt.training.flags.table import kinds_of

    read = set(data_flags.flags_read())
    for module in (training, checkpointing, data_samplers):
        tree = ast.walk(ast.parse(inspect.getsource(module)))
        read |= {node.attr for node in tree if isinstance(node, ast.Attribute)}
    actions = arguments._add_data_args(ArgumentParser(allow_abbrev=False))._actions
    supported = {action.dest for action in actions if "supported" in kinds_of(action)}
    assert len(supported) > 10 and supported <= read, supported - read


def test_the_cached_index_belongs_to_the_content(make, tmp_path):
    """A dataset that is indexed again under the same name is read whole; untouched, its cache is used again."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_opt.training import dataset

    def read(cache, blend):
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=8, blend=blend, split="1,0,0", path_to_cache=cache, reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
            tokenizer=SimpleNamespace(eod=127, vocab_size=128, unique_identifiers={}),
        )  # fmt: skip
        dataset._digest.cache_clear()  # another process
        train = BlendedMegatronDatasetBuilder(dataset.GPTDataset, [30, 0, 0], lambda: True, config).build()[0]
        return {int(token) for i in range(len(train)) for token in train[i]["tokens"]}

    for cache in (None, str(tmp_path / "cache")):
        for blend in ((["d"], None), (["d", "e"], [1.0, 1.0])):
            make("e", [20])
            make("d", [20, 20])
            assert max(read(cache, blend)) < 40
            files = sorted(tmp_path.rglob("*.npy"))
            assert max(read(cache, blend)) < 40 and sorted(tmp_path.rglob("*.npy")) == files
            make("d", [20] * 5)
            assert max(read(cache, blend)) > 95
            assert sorted(tmp_path.rglob("*.npy")) != files
