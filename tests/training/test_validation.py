"""The validation set as Megatron's datasets give it: the same first samples whatever the batch, the seed and the interval."""

from types import SimpleNamespace

import pytest
import torch

from megatron_opt import platform
from tests.distributed.pool import write_dataset

platform.activate()
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig  # noqa: E402

from megatron_opt.training import console, validation  # noqa: E402
from megatron_opt.training.dataset import GPTDataset  # noqa: E402

TOKENIZER = SimpleNamespace(eod=126, vocab_size=127, pad=-1, unique_identifiers={"class": "none"})


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "text", 60)


@pytest.fixture
def evaluate(prefix, tmp_path, monkeypatch):
    """(labels of the samples that an evaluation counts, the set's identity, what was said) for flags of a run."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)

    def made(batch, weights=None, seed=1, **flags):
        said = []
        monkeypatch.setattr(console, "note", said.append)
        plain = {
            "global_batch_size": batch, "eval_iters": 4, "eval_samples": None, "full_validation": False, "rank": 0,
            "seq_length": 32, "dataloader_type": "single", "eval_interval": 5, "train_iters": 10,
        }  # fmt: skip
        args = SimpleNamespace(**plain | flags)
        config = GPTDatasetConfig(
            random_seed=seed, sequence_length=32, blend_per_split=[None, ([prefix], weights), None], tokenizer=TOKENIZER,
            path_to_cache=str(tmp_path), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        )  # fmt: skip
        sets = validation.build(
            lambda config, sizes: BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build(),
            config, [0, None, None], args,
        )  # fmt: skip
        samples = [sets[1][place] for place in range(args.eval_iters * batch)]
        counted = [sample["labels"].tolist() for sample in samples if sample["loss_mask"].any()]
        return counted, args.validation_identity, said

    return made


def test_a_smaller_batch_reads_the_first_of_the_same_samples_and_says_so(evaluate):
    large, _, said = evaluate(8)
    assert len(large) == 32 and "the first 32 of " in said[0] and "--eval-samples 32" in said[0]
    for batch, seed, interval in ((2, 1, 5), (3, 7, 2), (5, 9, 10)):
        small, identity, said = evaluate(batch, seed=seed, eval_interval=interval)
        assert small == large[: 4 * batch] and identity["samples"] == 4 * batch
        assert f"--eval-iters 4 times the batch of {batch}" in said[0] and "more or fewer of them" in said[0]


def test_one_number_of_samples_is_one_set_whatever_the_batch(evaluate):
    for weights in (None, [1.0]):
        (first, one, said), (again, two, _) = (evaluate(batch, weights, eval_samples=13) for batch in (2, 8))
        assert first == again and len(first) == 13 and one == two and not said


def test_the_whole_needs_no_word(evaluate):
    read, identity, said = evaluate(64, eval_iters=4)
    assert identity["whole"] and len(read) == identity["of_samples"] and not said
