"""Training data that repeat: `--train-epochs E` reads the first 1/E of the run's samples E times, each time in another order.

Megatron's own GPTDataset repeats documents where a corpus ends: all copies are shuffled together and cut anew, so that a token may
come back at once and sequences differ from epoch to epoch; `--train-epochs 1` refuses that. Here an epoch is a whole number of
steps, every epoch has the same sequences, each once, and the first is what a run of one epoch would read.
"""

from typing import Any

import numpy as np

from megatron_opt.errors import UserError


class Repeated:
    """`dataset`'s first `unique` samples, `epochs` times; sample i is a function of (i, seed), so that a run resumes anywhere."""

    def __init__(self, dataset: Any, unique: int, epochs: int, seed: int) -> None:
        self.dataset, self.unique, self.epochs, self._seed = dataset, unique, epochs, seed
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        return self.unique * self.epochs

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = self.dataset[self.sample_of(int(index))]
        return sample

    def sample_of(self, index: int) -> int:
        """The sample of `dataset` that is read as number `index`; raises IndexError beyond the last epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, within = divmod(index, self.unique)
        if epoch == 0:
            return within
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.unique)
            self._epoch = epoch
        return int(self._order[within])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)


def unique_samples(samples: int | None, epochs: int) -> int:
    """Samples of one epoch of a run; raises UserError where an epoch would not be whole."""
    if not samples:
        raise UserError("--train-epochs repeats a run's samples; give the run a length (--train-iters).")
    if samples % epochs:
        raise UserError(
            f"--train-epochs {epochs} does not divide the run's {samples:,} samples, so that its last epoch would not be "
            "whole; change --train-iters to a multiple of it."
        )
    return samples // epochs


def short_of(dataset: Any) -> int | None:
    """Tokens of a data file that one epoch would have to repeat by itself; None where all samples are of unique tokens."""
    for part in getattr(dataset, "datasets", [dataset]):  # of a blend, its files
        if not hasattr(part, "_get_num_tokens_per_epoch"):
            continue
        tokens = int(part._get_num_tokens_per_epoch())
        if part._get_num_epochs(tokens) > 1:
            return tokens
    return None


def repeat(dataset: Any, unique: int, epochs: int, seed: int) -> Any:
    """The training set of every rank (None where a rank reads none); raises UserError on all of them for too small a corpus."""
    import torch
    import torch.distributed as dist

    from megatron_opt.kernels.host import current_device

    short = short_of(dataset) if dataset is not None else None
    if dist.is_initialized() and dist.get_world_size() > 1:
        lacks = torch.tensor([-1 if short is None else short], device=current_device())
        dist.all_reduce(lacks, op=dist.ReduceOp.MAX)  # ranks that read no data refuse as well
        short = int(lacks.item()) if lacks.item() >= 0 else None
    if short is not None:
        raise UserError(
            f"--train-epochs {epochs}: an epoch's {unique:,} samples are more than the data have ({short:,} tokens in a file), "
            "so that they would repeat within it; give more data, more epochs or a shorter run."
        )
    return dataset if dataset is None or epochs == 1 else Repeated(dataset, unique, epochs, seed)
