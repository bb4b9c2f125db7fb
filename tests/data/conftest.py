"""A made-up corpus and a tokenizer trained on it."""

from pathlib import Path

import pytest
from made_up import sentences, write_jsonl

from megatron_opt.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [sentences(1 + seed % 17, seed) for seed in range(120)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "train.jsonl", texts)


@pytest.fixture(scope="session")
def model(tmp_path_factory, corpus) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus, 400, path)
    return path
