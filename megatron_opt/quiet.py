"""Sentences of Megatron and torch that their user can do nothing about: these, and no others, are kept from the terminal."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

WARNINGS = (  # how they begin, as regular expressions
    r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to",
    r"Only transformer-engine>=1\.7\.0 supports MoE experts, but your version is 0\.0\.0\.",  # there is none
    r"Could not determine rank from torch\.distributed, RANK, or SLURM_PROCID\. Defaulting to rank 0\.",
    r"'pin_memory' argument is set as true but no accelerator is found",  # Megatron's loaders ask for it everywhere
    r"The argument order of (load|save) has been changed\.",  # Megatron's own calls
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated\.",  # Megatron's own calls
    r"Please use DTensor instead and we are deprecating ShardedTensor\.",  # Megatron's own tensors
    r"torch\.distributed is (disabled, )?unavailable or uninitialized, assuming the intent is to (save|load) in a single",
)
LOGGED = {  # by logger
    "torch.utils.cpp_extension": r"No CUDA runtime is found, using CUDA_HOME=",
    "megatron.core.models.gpt.gpt_model": r"GPTModel IS DEPRECATED\.",  # the flags say which model it is
    "megatron.core.dist_checkpointing.strategies.torch": r"MCore's async save is deprecated",
}


class _Known(logging.Filter):
    """Lets every record pass but those that begin so."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = re.compile(beginning)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.beginning.match(record.getMessage())


_FILTERS = {name: _Known(beginning) for name, beginning in LOGGED.items()}


def install() -> None:
    """Quiet them in this process from here on; a second call changes nothing."""
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)
    for name, known in _FILTERS.items():
        logging.getLogger(name).addFilter(known)


@contextmanager
def quieted() -> Iterator[None]:
    """The same warnings while this is open, for functions that have other callers than our commands; the log's filters stay."""
    with warnings.catch_warnings():
        install()
        yield
