"""Megatron's GPT dataset, whose cached sample index belongs to a content and not to a path; imports Megatron."""

import functools
from pathlib import Path
from typing import Any

from megatron.core.datasets import gpt_dataset

from megatron_opt.data.files import input_sha256
from megatron_opt.data.indexed import idx_path


class GPTDataset(gpt_dataset.GPTDataset):
    """Megatron names its cache by path, seed, length and split: after a new `P.idx` it would read by the index of the old one."""

    def __init__(self, indexed_dataset: Any, dataset_path: str, *args: Any) -> None:
        super().__init__(indexed_dataset, f"{dataset_path}#{_digest(idx_path(dataset_path))}", *args)


@functools.cache
def _digest(idx: Path) -> str:
    """SHA-256 of a `.idx`: it says where every document begins, which is all that a sample index is made of."""
    return input_sha256(idx)
