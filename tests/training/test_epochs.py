"""`--train-epochs`: every epoch reads the same samples, each once, in another order; nothing repeats within an epoch."""

import numpy as np
import pytest

from megatron_opt.errors import UserError
from megatron_opt.training.epochs import Repeated, repeat, short_of, unique_samples


class Samples:
    name = "a dataset"

    def __getitem__(self, index):
        return {"index": index}


def test_every_epoch_reads_the_same_samples_in_its_own_order():
    data = Repeated(Samples(), 50, 4, seed=7)
    read = [data[i]["index"] for i in range(len(data))]
    epochs = [read[k * 50 : (k + 1) * 50] for k in range(4)]
    assert epochs[0] == list(range(50)) and len(data) == 200 and data.name == "a dataset"
    assert all(sorted(one) == list(range(50)) for one in epochs)
    assert len({tuple(one) for one in epochs}) == 4
    rng = np.random.default_rng(0)  # a run that resumes asks for any sample first, and so does another rank
    for i in rng.permutation(200)[:60]:
        assert Repeated(Samples(), 50, 4, seed=7)[i]["index"] == data[i]["index"] == read[i]
    assert [Repeated(Samples(), 50, 4, seed=8)[i]["index"] for i in range(200)] != read
    with pytest.raises(IndexError):
        data[200]


def test_epochs_that_are_not_whole_are_refused():
    assert unique_samples(120, 3) == 40
    for samples in (121, 0, None):
        with pytest.raises(UserError, match="--train-epochs"):
            unique_samples(samples, 3)


class File:
    """Of Megatron's GPTDataset what says whether it repeats."""

    def __init__(self, tokens, wanted):
        self._tokens, self._wanted = tokens, wanted

    def _get_num_tokens_per_epoch(self):
        return self._tokens

    def _get_num_epochs(self, tokens):
        return -(-self._wanted // tokens)


class Blend:
    def __init__(self, *parts):
        self.datasets = parts


def test_a_corpus_that_is_too_small_for_an_epoch_is_refused():
    assert short_of(File(100, 90)) is None and short_of(File(100, 101)) == 100
    assert short_of(Blend(File(100, 90), File(30, 40))) == 30
    with pytest.raises(UserError, match="more than the data have"):
        repeat(File(100, 101), 10, 2, 1)
    whole = File(100, 90)
    assert repeat(whole, 10, 1, 1) is whole
    assert isinstance(repeat(File(100, 90), 10, 2, 1), Repeated) and repeat(None, 10, 2, 1) is None
