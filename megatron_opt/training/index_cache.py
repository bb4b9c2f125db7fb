"""Megatron's cache of sample indices, safe for jobs that share a dataset: each array appears whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opt.files import replacing


@contextmanager
def whole_arrays() -> Iterator[None]:
    """While open, `numpy.save` writes beside its target and renames.

    Megatron takes the cache for complete as soon as its files exist; a second job that starts on the same data
    would read an array that the first one is still writing.
    """
    save = np.save

    def save_whole(file: Any, arr: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):
            return save(file, arr, *args, **kwargs)
        target = Path(file)
        if target.suffix != ".npy":
            target = target.with_name(target.name + ".npy")
        with replacing(target) as stream:
            save(stream, arr, *args, **kwargs)

    np.save = save_whole
    try:
        yield
    finally:
        np.save = save
